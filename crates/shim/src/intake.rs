//! Reads an agent's output from its pipes into the log.
//!
//! A quiet agent costs a small buffer and a pipe of the default size. An agent that writes much gets larger ones, since
//! fewer and longer reads and writes make up most of the speed of a log.

use std::fs::File;
use std::io::{self, Read};

use nix::fcntl::{FcntlArg, fcntl};

use super::log_line::Stream;
use super::log_sink::LogSink;
use fermata_os::clock;

/// The buffer size for an agent that writes little, in bytes.
const SMALL: usize = 16 * 1024;
/// The buffer size for an agent that writes much, in bytes.
const LARGE: usize = 256 * 1024;
/// The pipe size of an agent that writes much. The kernel limits the total size of one user's pipes
/// (`pipe-user-pages-soft`, pipe(7)) and refuses larger ones beyond.
const LARGE_PIPE: i32 = 256 * 1024;
/// The large buffer is released after this many small reads in a row.
const CALM: u32 = 64;

/// The result of one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntakeResult {
    /// This many bytes were read.
    Bytes(usize),
    /// No output is available now.
    Nothing,
    /// The stream has ended.
    End,
}

/// The buffer between pipes and log.
#[derive(Debug)]
pub struct Intake {
    buffer: Vec<u8>,
    small_reads: u32,
}

impl Default for Intake {
    fn default() -> Self {
        Self { buffer: vec![0; SMALL], small_reads: 0 }
    }
}

impl Intake {
    /// Reads once, and closes the pipe at the end of the stream.
    pub fn read(&mut self, pipe: &mut Option<File>, stream: Stream, log: &mut LogSink) -> IntakeResult {
        self.read_and_show(pipe, stream, log, |_| {})
    }

    /// Reads once like [`Intake::read`], and passes what was read to `show`.
    pub fn read_and_show(
        &mut self,
        pipe: &mut Option<File>,
        stream: Stream,
        log: &mut LogSink,
        show: impl FnOnce(&[u8]),
    ) -> IntakeResult {
        let Some(file) = pipe else { return IntakeResult::End };
        let read = match file.read(&mut self.buffer) {
            // EIO is the end of file of a terminal (pty(7)).
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            other => other,
        };
        match read {
            Ok(0) => {
                log.end(stream, clock::unix_ns());
                *pipe = None;
                IntakeResult::End
            }
            Ok(count) => {
                log.push(stream, &self.buffer[..count], clock::unix_ns());
                show(&self.buffer[..count]);
                self.adapt(count, file);
                IntakeResult::Bytes(count)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                IntakeResult::Nothing
            }
            Err(error) => {
                eprintln!("fermata-shim: failed to read {}: {error}", stream.word());
                log.end(stream, clock::unix_ns());
                *pipe = None;
                IntakeResult::End
            }
        }
    }

    /// Reads the available output, at most two buffers, so that the lines of two streams are logged approximately in
    /// the order in which they were written.
    pub fn take(&mut self, pipe: &mut Option<File>, stream: Stream, log: &mut LogSink) -> IntakeResult {
        let room = self.buffer.len();
        match self.read(pipe, stream, log) {
            IntakeResult::Bytes(count) if count == room => {
                self.read(pipe, stream, log);
                IntakeResult::Bytes(count)
            }
            result @ (IntakeResult::Bytes(_) | IntakeResult::Nothing | IntakeResult::End) => result,
        }
    }

    /// Reads the available output, at most about `limit` bytes, since a process may still be writing.
    pub fn drain(&mut self, pipe: &mut Option<File>, stream: Stream, log: &mut LogSink, limit: usize) {
        let mut taken = 0;
        while taken < limit {
            match self.read(pipe, stream, log) {
                IntakeResult::Bytes(count) => taken += count,
                IntakeResult::Nothing | IntakeResult::End => break,
            }
        }
    }

    fn adapt(&mut self, count: usize, pipe: &File) {
        if count == self.buffer.len() && count < LARGE {
            self.buffer = vec![0; LARGE];
            // Refused if the user has many such pipes; the default size works too.
            fcntl(pipe, FcntlArg::F_SETPIPE_SZ(LARGE_PIPE)).ok();
        }
        let small = count < SMALL / 2 && self.buffer.len() > SMALL;
        self.small_reads = if small { self.small_reads + 1 } else { 0 };
        if self.small_reads >= CALM {
            *self = Self::default();
        }
    }
}
