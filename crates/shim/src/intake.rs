//! Takes an agent's output from its pipes into the log.
//!
//! A quiet agent costs a small buffer and the kernel's usual pipe. One that writes faster than it
//! is read gets larger ones: fewer and longer reads and writes are most of what makes a log fast.

use std::fs::File;
use std::io::{self, Read};

use nix::fcntl::{FcntlArg, fcntl};

use super::log_line::Stream;
use super::log_sink::LogSink;
use fermata_os::clock;

/// What is read at once from an agent that writes little.
const SMALL: usize = 16 * 1024;
/// What is read at once from an agent that writes much.
const LARGE: usize = 256 * 1024;
/// The size of the pipe of an agent that writes much. Not more: the kernel bounds what one user's
/// pipes may hold altogether (`pipe-user-pages-soft`, pipe(7)), and it refuses beyond.
const LARGE_PIPE: i32 = 256 * 1024;
/// After so many small reads in a row the large buffer is given back.
const CALM: u32 = 64;

/// What came of one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntakeResult {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
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
    /// Reads once; at the end of the stream the pipe is closed.
    pub fn read(&mut self, pipe: &mut Option<File>, stream: Stream, log: &mut LogSink) -> IntakeResult {
        self.read_and_show(pipe, stream, log, |_| {})
    }

    /// The same, and shows what was read to somebody else.
    pub fn read_and_show(
        &mut self,
        pipe: &mut Option<File>,
        stream: Stream,
        log: &mut LogSink,
        show: impl FnOnce(&[u8]),
    ) -> IntakeResult {
        let Some(file) = pipe else { return IntakeResult::End };
        let read = match file.read(&mut self.buffer) {
            // The end of a terminal (pty(7)).
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

    /// Reads what is there now, as far as one or two reads reach: two streams then come in the order
    /// in which they were written, as far as anybody can tell.
    pub fn take(&mut self, pipe: &mut Option<File>, stream: Stream, log: &mut LogSink) -> IntakeResult {
        let room = self.buffer.len();
        match self.read(pipe, stream, log) {
            IntakeResult::Bytes(count) if count == room => {
                self.read(pipe, stream, log);
                IntakeResult::Bytes(count)
            }
            other => other,
        }
    }

    /// Reads what is there now, at most about `limit` bytes: somebody may still be writing.
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
            // Refused where the user has many such pipes; the usual size is fine too.
            fcntl(pipe, FcntlArg::F_SETPIPE_SZ(LARGE_PIPE)).ok();
        }
        let small = count < SMALL / 2 && self.buffer.len() > SMALL;
        self.small_reads = if small { self.small_reads + 1 } else { 0 };
        if self.small_reads >= CALM {
            *self = Self::default();
        }
    }
}
