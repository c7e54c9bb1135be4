//! The terminal of one agent, as its shim holds it.
//!
//! ```text
//!  agent ── slave │ master ──> log.rs                         raw bytes
//!                 │        └─> sequences ──> replies ── questions are answered here
//!                 │                      ├─> screen            what is seen now
//!                 │                      └─> viewers           connections that watch
//!                 │ master <── typed <── `type` requests
//! ```
//!
//! The shim keeps the slave open: between two programs that use the terminal it does not hang up.
//! It lets go of it when the agent has ended, and what was written last is read up to the end.
//!
//! The agent never waits for a viewer, and the model exists for agents with a terminal only.

mod modes;
mod replies;
mod screen;
mod sequences;
mod viewers;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fermata_protocol::supervision::TerminalSize;

use self::replies::SequenceDecision;
use self::screen::Screen;
use self::sequences::{Piece, Splitter};
use self::viewers::Viewers;
use super::connection::{Connection, ConnectionId};
use super::freeze::Refused;
use super::wire::RefusalCode;
use fermata_os::pty;

/// How much may wait for an agent that does not read what is typed.
const MAX_TYPED: usize = 64 * 1024;

/// How much a program may have asked its terminal without reading an answer.
const MAX_ANSWERS: usize = 8 * 1024;

/// One agent's terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    slave: Option<OwnedFd>,
    splitter: Splitter,
    screen: Screen,
    viewers: Viewers,
    typed: Vec<u8>,
}

impl Terminal {
    /// Takes over both ends.
    pub fn new(master: OwnedFd, slave: OwnedFd, size: TerminalSize) -> Self {
        Self {
            master: File::from(master),
            slave: Some(slave),
            splitter: Splitter::default(),
            screen: Screen::new(size),
            viewers: Viewers::default(),
            typed: Vec::new(),
        }
    }

    /// Its size.
    pub fn size(&self) -> TerminalSize {
        self.screen.size()
    }

    /// Shows what the agent has written.
    pub fn show(&mut self, bytes: &[u8]) {
        let Self { splitter, screen, viewers, typed, .. } = self;
        splitter.feed(bytes, |piece| match piece {
            Piece::Text(text) => {
                screen.text(text);
                viewers.output(text.as_bytes());
            }
            Piece::Sequence(sequence) => match replies::judge(sequence, screen) {
                SequenceDecision::Show => {
                    screen.sequence(sequence);
                    viewers.output(sequence);
                }
                SequenceDecision::Answer(answer) if typed.len() + answer.len() <= MAX_ANSWERS => {
                    typed.extend_from_slice(answer.as_bytes());
                }
                // A program that asks and never reads gets no more answers.
                SequenceDecision::Answer(_) => {}
            },
        });
        self.flush();
    }

    /// Takes what is typed; returns how much of it found a place.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let room = MAX_TYPED.saturating_sub(self.typed.len());
        let taken = bytes.len().min(room);
        self.typed.extend_from_slice(&bytes[..taken]);
        self.flush();
        taken
    }

    /// Whether something typed waits for the kernel to take it.
    pub fn wants_write(&self) -> bool {
        !self.typed.is_empty()
    }

    /// Hands to the kernel what it takes.
    pub fn flush(&mut self) {
        while !self.typed.is_empty() {
            match self.master.write(&self.typed) {
                Ok(0) => return,
                Ok(count) => {
                    self.typed.drain(..count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Nobody will ever read it.
                Err(_) => self.typed.clear(),
            }
        }
    }

    /// Takes another size on; the kernel tells the agent.
    ///
    /// # Errors
    /// When the kernel refuses the size.
    pub fn resize(&mut self, size: TerminalSize) -> Result<(), Refused> {
        if size == self.size() {
            return Ok(());
        }
        pty::resize(&self.master, size.rows, size.cols).map_err(|error| {
            let message = format!("failed to make the terminal {} x {}: {error}", size.rows, size.cols);
            Refused::new(RefusalCode::ResizeFailed, message)
        })?;
        self.screen.resize(size);
        self.viewers.draw_anew();
        Ok(())
    }

    /// Lets a connection watch; it is shown the screen first.
    ///
    /// # Errors
    /// When so many watch already.
    pub fn watch(&mut self, connection: ConnectionId, scrollback: bool) -> Result<(), Refused> {
        self.viewers.add(connection, scrollback)
    }

    /// Lets go of the agent's end: after what was written, the master reads an end.
    pub fn hang_up(&mut self) {
        self.slave = None;
    }

    /// Gives the viewers what they are owed, as far as they take it.
    pub fn feed(&mut self, connections: &mut [Connection]) {
        self.viewers.feed(connections, &self.screen);
    }

    /// Gives the viewers the last of it, before the end is told.
    pub fn feed_last(&mut self, connections: &mut [Connection]) {
        self.viewers.feed(connections, &self.screen);
        self.viewers.finish(connections, &self.screen);
    }
}

impl AsFd for Terminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}
