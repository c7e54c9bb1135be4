//! The destination of an agent's output: the log itself, or a log writer process.
//!
//! A write to a file can take arbitrarily long, and an agent whose pipe is full waits for it. That is the default
//! policy (`block`). With the policy `drop` a separate process writes (`log_writer_process`), and output that it does
//! not accept at once is dropped, counted and reported: an agent then never waits for a disk.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memchr::memchr_iter;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, sendmsg};

use super::log::{LogWriter, Loss};
use super::log_line::Stream;
use super::log_writer_process::{MessageKind, PIECE, apply, head, parse};
use super::spec::LogLimits;

/// How long the log writer process may take to write its remaining messages after the agent's end. The shim does not
/// answer requests meanwhile, so this is less than the time a daemon waits for a silent shim (`shim_patience_ms`).
const FINISH_PATIENCE: Duration = Duration::from_secs(10);

/// The destination of an agent's output.
#[derive(Debug)]
pub enum LogSink {
    /// The shim writes the log.
    Direct(LogWriter),
    /// The log writer process writes the log.
    Process(LogWriterLink),
}

impl LogSink {
    /// See [`LogWriter::push`].
    pub fn push(&mut self, stream: Stream, chunk: &[u8], now_ns: i64) {
        let taken = match self {
            Self::Direct(log) => return log.push(stream, chunk, now_ns),
            Self::Process(process) => process.push(stream, chunk, now_ns),
        };
        self.take_over(now_ns);
        match self {
            Self::Direct(log) => log.push(stream, &chunk[taken..], now_ns),
            Self::Process(process) => process.lose(&chunk[taken..], now_ns),
        }
    }

    /// See [`LogWriter::end`].
    pub fn end(&mut self, stream: Stream, now_ns: i64) {
        match self {
            Self::Direct(log) => return log.end(stream, now_ns),
            Self::Process(process) => process.post(end_of(stream), now_ns, &[]),
        }
        self.take_over(now_ns);
    }

    /// See [`LogWriter::say`].
    pub fn say(&mut self, stream: Stream, text: &[u8], now_ns: i64) {
        match self {
            Self::Direct(log) => return log.say(stream, text, now_ns),
            Self::Process(process) => {
                process.post(if stream == Stream::Gap { MessageKind::Gap } else { MessageKind::Note }, now_ns, text)
            }
        }
        self.take_over(now_ns);
    }

    /// See [`LogWriter::flush`].
    pub fn flush(&mut self, now_ns: i64) {
        match self {
            Self::Direct(log) => return log.flush(now_ns),
            Self::Process(process) => process.send_backlog(),
        }
        self.take_over(now_ns);
    }

    /// Returns the number of bytes lost so far.
    pub fn lost(&self) -> u64 {
        match self {
            Self::Direct(log) => log.lost(),
            Self::Process(process) => process.lost,
        }
    }

    /// Writes the remaining output and syncs the log. A log writer process has 10 s for this.
    pub fn finish(&mut self, now_ns: i64) {
        if let Self::Process(process) = self {
            process.finish(now_ns);
        }
        self.take_over(now_ns);
        if let Self::Direct(log) = self {
            log.finish(now_ns);
        }
    }

    /// Makes the shim write the log once the log writer process has died, because another process has killed it.
    fn take_over(&mut self, now_ns: i64) {
        let Self::Process(process) = self else { return };
        if !process.gone {
            return;
        }
        match LogWriter::open(&process.dir, process.limits) {
            Ok(mut log) => {
                log.count_lost(process.lost);
                let text = "the log writer process was killed; output that it had not written is lost";
                log.say(Stream::Gap, text.as_bytes(), now_ns);
                for message in &process.backlog {
                    // Always succeeds: the shim has built the message itself.
                    let Ok((kind, at_ns, rest)) = parse(message) else { continue };
                    apply(&mut log, kind, at_ns, rest);
                }
                // This output was lost after the queued messages, see `post`.
                if process.unreported.bytes > 0 {
                    log.say(Stream::Gap, &process.unreported.sentence(TOO_FAST), now_ns);
                }
                *self = Self::Direct(log);
            }
            Err(error) => eprintln!("fermata-shim: failed to reopen the log: {error}"),
        }
    }
}

const TOO_FAST: &str = "it came faster than it could be written";

fn end_of(stream: Stream) -> MessageKind {
    if stream == Stream::Stderr { MessageKind::EndOfStderr } else { MessageKind::EndOfStdout }
}

/// The shim's side of a log writer process.
#[derive(Debug)]
pub struct LogWriterLink {
    socket: OwnedFd,
    dir: PathBuf,
    limits: LogLimits,
    /// Short messages that must not be lost and could not be sent yet.
    backlog: Vec<Vec<u8>>,
    unreported: Loss,
    lost: u64,
    gone: bool,
}

impl LogWriterLink {
    /// Takes the shim's end of the log writer process's socket.
    pub fn new(socket: OwnedFd, dir: &Path, limits: LogLimits) -> Self {
        let dir = dir.to_path_buf();
        Self { socket, dir, limits, backlog: Vec::new(), unreported: Loss::default(), lost: 0, gone: false }
    }

    /// Returns how many bytes were sent or dropped: all, unless the log writer process has died.
    fn push(&mut self, stream: Stream, chunk: &[u8], now_ns: i64) -> usize {
        let kind = if stream == Stream::Stderr { MessageKind::Stderr } else { MessageKind::Stdout };
        let mut taken = 0;
        for piece in chunk.chunks(PIECE) {
            self.send_backlog();
            self.report_loss(now_ns);
            // Output after a gap must be written after the report of the gap.
            let free = self.backlog.is_empty() && self.unreported.bytes == 0;
            let sent = free && self.send(kind, now_ns, piece);
            if self.gone {
                break;
            }
            if !sent {
                self.lose(piece, now_ns);
            }
            taken += piece.len();
        }
        taken
    }

    fn lose(&mut self, bytes: &[u8], now_ns: i64) {
        if !bytes.is_empty() {
            self.unreported.add(bytes.len() as u64, memchr_iter(b'\n', bytes).count() as u64, now_ns);
            self.lost += bytes.len() as u64;
        }
    }

    /// Sends the report of lost output, as soon as the socket has room for it.
    fn report_loss(&mut self, now_ns: i64) {
        if self.unreported.bytes > 0 && self.backlog.is_empty() {
            let text = self.unreported.sentence(TOO_FAST);
            if self.send(MessageKind::Gap, now_ns, &text) {
                self.unreported = Loss::default();
            }
        }
    }

    /// Sends a short message, now or later.
    fn post(&mut self, kind: MessageKind, now_ns: i64, text: &[u8]) {
        self.send_backlog();
        self.report_loss(now_ns);
        if self.unreported.bytes > 0 {
            // There may be no later opportunity: the report of a gap precedes the message.
            let gap = std::mem::take(&mut self.unreported).sentence(TOO_FAST);
            self.queue(MessageKind::Gap, now_ns, &gap);
        }
        if !(self.backlog.is_empty() && self.send(kind, now_ns, text)) {
            self.queue(kind, now_ns, text);
        }
    }

    fn queue(&mut self, kind: MessageKind, now_ns: i64, text: &[u8]) {
        let mut message = head(kind, now_ns).to_vec();
        message.extend_from_slice(text);
        self.backlog.push(message);
    }

    fn send_backlog(&mut self) {
        while let Some(first) = self.backlog.first() {
            if !Self::send_now(&self.socket, &mut self.gone, &[IoSlice::new(first)]) {
                return;
            }
            self.backlog.remove(0);
        }
    }

    fn send(&mut self, kind: MessageKind, now_ns: i64, bytes: &[u8]) -> bool {
        let head = head(kind, now_ns);
        Self::send_now(&self.socket, &mut self.gone, &[IoSlice::new(&head), IoSlice::new(bytes)])
    }

    /// Sends one message completely, or not at all; never waits.
    fn send_now(socket: &OwnedFd, gone: &mut bool, parts: &[IoSlice<'_>]) -> bool {
        loop {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(socket.as_raw_fd(), parts, &[], flags, None) {
                Ok(_) => return true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => return false,
                Err(errno) => {
                    if !*gone {
                        eprintln!("fermata-shim: the log writer process is gone: {errno}");
                    }
                    *gone = true;
                    return false;
                }
            }
        }
    }

    fn finish(&mut self, now_ns: i64) {
        let until = Instant::now() + FINISH_PATIENCE;
        self.post(MessageKind::Finish, now_ns, &[]);
        while !self.backlog.is_empty() && !self.gone && self.wait(PollFlags::POLLOUT, until) {
            self.send_backlog();
        }
        // Once everything is on disk, the process answers with the number of bytes that it has lost.
        let mut answer = [0; 8];
        while !self.gone {
            if !self.wait(PollFlags::POLLIN, until) {
                eprintln!("fermata-shim: the log is incomplete: the log writer process did not finish in time");
                return;
            }
            match recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
                Ok(8) => {
                    self.lost += u64::from_le_bytes(answer);
                    return;
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Ok(_) | Err(_) => self.gone = true,
            }
        }
    }

    fn wait(&self, flags: PollFlags, until: Instant) -> bool {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), flags)], timeout) {
                Err(Errno::EINTR) => {}
                Ok(0) | Err(_) => return false,
                Ok(_) => return true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::log_writer_process;
    use super::*;

    fn receive(socket: &OwnedFd) -> Option<MessageKind> {
        let mut buffer = vec![0; PIECE + 1024];
        let count = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).ok()?;
        Some(parse(&buffer[..count]).unwrap().0)
    }

    #[test]
    fn a_gap_comes_before_what_follows_it_and_also_at_the_very_end() {
        let (ours, theirs) = log_writer_process::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut process = LogWriterLink::new(ours, dir.path(), LogLimits::default());
        let piece = vec![b'x'; PIECE];
        while process.lost == 0 {
            process.push(Stream::Stdout, &piece, 1);
        }
        // The socket first has no room at all, and then only for some messages.
        process.post(MessageKind::Note, 2, b"a note");
        process.push(Stream::Stdout, b"lost too", 3);
        let mut received = Vec::new();
        received.extend(receive(&theirs));
        process.push(Stream::Stderr, b"this may fit", 4);
        process.post(MessageKind::Finish, 5, &[]);
        while let Some(kind) = receive(&theirs) {
            received.push(kind);
            process.send_backlog();
        }
        let rest: Vec<MessageKind> = received.into_iter().skip_while(|kind| *kind == MessageKind::Stdout).collect();
        assert_eq!(rest[..2], [MessageKind::Gap, MessageKind::Note], "{rest:?}");
        let written = rest.contains(&MessageKind::Stderr);
        let end: &[MessageKind] = if written {
            &[MessageKind::Gap, MessageKind::Stderr, MessageKind::Finish]
        } else {
            &[MessageKind::Gap, MessageKind::Finish]
        };
        assert_eq!(&rest[2..], end, "{rest:?}");
        assert!(process.backlog.is_empty() && process.unreported.bytes == 0);
    }
}
