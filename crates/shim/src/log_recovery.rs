//! Recovers the output that an agent had written and its shim had not read when the shim was killed.
//!
//! A pipe keeps its content while a process has one of its ends open, and the agent's processes have the writing end.
//! `/proc/PID/fd/N` opens the reading end of the same pipe (proc(5)). So the tree is stopped, its pipes are opened, the
//! tree is killed, and then the pipes are read to their end into the log. This requires no descriptor to be recovered in
//! advance.
//!
//! Not recoverable: the beginning of a line that the shim had already read, and the content of a pipe whose last writer
//! ended before the recovery, for instance because of SIGPIPE.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::log::{CURRENT, LogWriter};
use super::log_line::Stream;
use super::record::RunRecord;
use super::spec::{LaunchSpec, files};
use fermata_os::clock;

/// The pipes of a run whose shim was killed.
#[derive(Debug, Default)]
pub struct LogRecovery {
    pipes: Vec<(Stream, File)>,
}

impl LogRecovery {
    /// Opens the pipes of a run. `holders` are the processes that may have them open for writing.
    pub fn open(run: &RunRecord, holders: impl IntoIterator<Item = i32> + Clone) -> Self {
        let wanted = [(Stream::Stdout, run.stdout_pipe), (Stream::Stderr, run.stderr_pipe)];
        let open = |(stream, inode): (Stream, Option<u64>)| {
            let inode = inode?;
            holders.clone().into_iter().find_map(|pid| open_pipe(pid, inode)).map(|file| (stream, file))
        };
        Self { pipes: wanted.into_iter().filter_map(open).collect() }
    }

    /// Appends the content of the pipes to the run's log and returns the number of bytes. Must be called when no
    /// process of the tree writes any more.
    ///
    /// # Errors
    /// If the log cannot be opened.
    pub fn write_to_log(self, run_dir: &Path) -> io::Result<u64> {
        let mut log = None;
        let mut recovered = 0;
        let mut buffer = vec![0; 64 * 1024];
        for (stream, mut pipe) in self.pipes {
            // Ends at the end of file, or when a process outside the tree has a pipe open and it is empty.
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                let log = match &mut log {
                    Some(log) => log,
                    unopened @ None => unopened.insert(open_log(run_dir)?),
                };
                log.push(stream, &buffer[..count], clock::unix_ns());
                log.flush(clock::unix_ns());
                recovered += count as u64;
            }
        }
        if let Some(mut log) = log {
            log.finish(clock::unix_ns());
        }
        Ok(recovered)
    }
}

fn open_pipe(pid: i32, inode: u64) -> Option<File> {
    let name = format!("pipe:[{inode}]");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    descriptors.flatten().find_map(|entry| {
        if fs::read_link(entry.path()).ok()?.as_os_str() != name.as_str() {
            return None;
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(entry.path()).ok()?;
        // The descriptor may have been replaced between reading the link and opening it.
        (file.metadata().ok()?.ino() == inode).then_some(file)
    })
}

fn open_log(run_dir: &Path) -> io::Result<LogWriter> {
    let limits = LaunchSpec::read(run_dir).map(|spec| spec.log).unwrap_or_default();
    let dir = run_dir.join(files::LOGS);
    end_torn_line(&dir.join(CURRENT))?;
    LogWriter::open(&dir, limits)
}

/// Ends an incomplete last line, which a shim that was killed during a write leaves; readers skip such a line once it
/// has an end.
fn end_torn_line(path: &Path) -> io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    let mut file = match OpenOptions::new().read(true).append(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if file.metadata()?.len() == 0 {
        return Ok(());
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") }
}
