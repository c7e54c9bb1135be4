//! The connections that watch a terminal, and what has been sent to each of them.
//!
//! ```text
//!            watch                  no bytes wait for it          all of it was sent
//!  (joins) ────────> Behind ─────────────────────────> Drawing ───────────────────────> Live
//!                      ^                                  │ the screen has changed      │
//!                      ├──────────────────────────────────┘                             │
//!                      └────────────────────────────────────────────────────────────────┘
//!                                        it reads too slowly, or the size has changed
//! ```
//!
//! A viewer that is behind gets the present screen once it has read the bytes sent before: a viewer that never reads
//! costs at most [`PATIENCE`] bytes and one screen.

use fermata_protocol::terminal::Bytes;

use super::screen::Screen;
use crate::connection::{ConnectionId, MAX_OUTBOX, PeerConnection};
use crate::reply::Refused;
use crate::wire::{FromShim, RefusalCode, ShimEvent};

/// The maximum number of viewers of one terminal.
pub const MAX_VIEWERS: usize = 8;

/// How many bytes may wait for a viewer before it is considered behind.
const PATIENCE: usize = 64 * 1024;

/// The maximum number of output bytes in one line of the protocol; after base64 more would not fit.
const CHUNK: usize = 24 * 1024;

#[derive(Debug)]
enum Shown {
    /// The viewer has been sent everything so far.
    Live,
    /// The screen must be drawn for the viewer.
    Behind,
    /// The drawing of the screen is being sent, as the screen was when this started.
    Drawing { bytes: Vec<u8>, at: usize, outdated: bool },
}

#[derive(Debug)]
struct Viewer {
    connection: ConnectionId,
    /// Whether the next drawing starts with the lines that have left the screen.
    scrollback: bool,
    shown: Shown,
}

/// All viewers.
#[derive(Debug, Default)]
pub struct Viewers {
    all: Vec<Viewer>,
    /// Output that has not been sent to any viewer yet.
    fresh: Vec<u8>,
}

impl Viewers {
    /// Adds a connection, or starts again if the connection is a viewer already.
    pub fn add(&mut self, connection: ConnectionId, scrollback: bool) -> Result<(), Refused> {
        let viewer = Viewer { connection, scrollback, shown: Shown::Behind };
        if let Some(present) = self.all.iter_mut().find(|present| present.connection == connection) {
            *present = viewer;
            return Ok(());
        }
        if self.all.len() >= MAX_VIEWERS {
            let message = format!("{MAX_VIEWERS} viewers watch this terminal already");
            return Err(Refused::new(RefusalCode::TooManyViewers, message));
        }
        self.all.push(viewer);
        Ok(())
    }

    /// Keeps output for the next [`Viewers::feed`].
    pub fn output(&mut self, bytes: &[u8]) {
        if !self.all.is_empty() {
            self.fresh.extend_from_slice(bytes);
        }
    }

    /// Has the screen drawn for all viewers.
    pub fn draw_anew(&mut self) {
        for viewer in &mut self.all {
            match &mut viewer.shown {
                Shown::Drawing { outdated, .. } => *outdated = true,
                shown @ (Shown::Live | Shown::Behind) => *shown = Shown::Behind,
            }
        }
    }

    /// Sends new output and continues drawings.
    pub fn feed(&mut self, connections: &mut [PeerConnection], screen: &Screen) {
        let fresh = std::mem::take(&mut self.fresh);
        self.all.retain_mut(|viewer| {
            let Some(connection) = connections.iter_mut().find(|c| c.id() == viewer.connection && c.is_open()) else {
                return false;
            };
            viewer.output(connection, &fresh);
            viewer.go_on(connection, screen, PATIENCE);
            true
        });
        self.fresh = fresh;
        self.fresh.clear();
        self.fresh.shrink_to(CHUNK);
    }

    /// Sends as much as fits, whether or not the viewers have read the bytes sent before: no output follows.
    pub fn finish(&mut self, connections: &mut [PeerConnection], screen: &Screen) {
        for viewer in &mut self.all {
            let Some(connection) = connections.iter_mut().find(|c| c.id() == viewer.connection && c.is_open()) else {
                continue;
            };
            // Twice, since a drawing that was started earlier may be outdated.
            for _ in 0..2 {
                if let Shown::Behind = viewer.shown {
                    viewer.begin(connection, screen);
                }
                viewer.go_on(connection, screen, MAX_OUTBOX - 2 * CHUNK);
            }
        }
    }
}

impl Viewer {
    fn output(&mut self, connection: &mut PeerConnection, fresh: &[u8]) {
        if fresh.is_empty() {
            return;
        }
        match &mut self.shown {
            Shown::Live if connection.waiting() + fresh.len() > PATIENCE => self.shown = Shown::Behind,
            Shown::Live => fresh.chunks(CHUNK).for_each(|chunk| send(connection, chunk)),
            Shown::Behind => {}
            Shown::Drawing { outdated, .. } => *outdated = true,
        }
    }

    fn begin(&mut self, connection: &mut PeerConnection, screen: &Screen) {
        connection.send(&FromShim::Event(ShimEvent::Screen(screen.size())));
        let bytes = screen.draw(std::mem::take(&mut self.scrollback));
        self.shown = Shown::Drawing { bytes, at: 0, outdated: false };
    }

    fn go_on(&mut self, connection: &mut PeerConnection, screen: &Screen, limit: usize) {
        if matches!(self.shown, Shown::Behind) && connection.waiting() == 0 {
            self.begin(connection, screen);
        }
        let Shown::Drawing { bytes, at, outdated } = &mut self.shown else { return };
        while *at < bytes.len() && connection.waiting() < limit {
            let end = bytes.len().min(*at + CHUNK);
            send(connection, &bytes[*at..end]);
            *at = end;
        }
        if *at == bytes.len() {
            self.shown = if *outdated { Shown::Behind } else { Shown::Live };
        }
    }
}

fn send(connection: &mut PeerConnection, bytes: &[u8]) {
    connection.send(&FromShim::Event(ShimEvent::Output { data: Bytes(bytes.to_vec()) }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_protocol::supervision::TerminalSize;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    const SIZE: TerminalSize = TerminalSize { rows: 24, cols: 80 };

    fn open(id: u64) -> (PeerConnection, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut connection = PeerConnection::new(ConnectionId(id), ours).unwrap();
        theirs.write_all(b"{\"hello\":{\"version\":1}}\n").unwrap();
        connection.receive();
        theirs.set_nonblocking(true).unwrap();
        (connection, theirs)
    }

    /// Reads the available lines into `output`, which starts anew at each `screen` event; returns the number of those
    /// events.
    fn read(theirs: &mut UnixStream, inbox: &mut Vec<u8>, output: &mut Vec<u8>) -> usize {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = theirs.read(&mut chunk) {
            inbox.extend_from_slice(&chunk[..count]);
        }
        let mut screens = 0;
        while let Some(end) = inbox.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = inbox.drain(..=end).collect();
            match serde_json::from_slice(&line).unwrap() {
                FromShim::Event(ShimEvent::Screen(_)) => {
                    screens += 1;
                    output.clear();
                }
                FromShim::Event(ShimEvent::Output { data }) => output.extend_from_slice(&data.0),
                other => panic!("{other:?}"),
            }
        }
        screens
    }

    #[test]
    fn a_viewer_that_reads_gets_everything_and_one_that_does_not_gets_the_last_screen() {
        let mut screen = Screen::new(SIZE);
        let mut viewers = Viewers::default();
        let (quick, mut quick_end) = open(1);
        let (lazy, mut lazy_end) = open(2);
        let mut connections = [quick, lazy];
        viewers.add(ConnectionId(1), false).unwrap();
        viewers.add(ConnectionId(2), false).unwrap();
        let (mut inbox, mut output, mut screens) = (Vec::new(), Vec::new(), 0);
        for number in 0..40_000 {
            let line = format!("this is line {number}\r\n");
            screen.text(&line);
            viewers.output(line.as_bytes());
            viewers.feed(&mut connections, &screen);
            connections.iter_mut().for_each(PeerConnection::flush);
            screens += read(&mut quick_end, &mut inbox, &mut output);
        }
        assert_eq!(screens, 1, "the screen is drawn once for a viewer that reads");
        let text = String::from_utf8_lossy(&output).into_owned();
        let mut rest = text.as_str();
        for number in 1..40_000 {
            let at = rest.find(&format!("line {number}\r"));
            rest = &rest[at.unwrap_or_else(|| panic!("line {number} is missing"))..];
        }
        assert!(connections[1].is_open() && connections[1].waiting() <= PATIENCE + 2 * CHUNK);

        // Now the other viewer reads.
        let (mut inbox, mut output, mut screens) = (Vec::new(), Vec::new(), 0);
        for _ in 0..100 {
            screens += read(&mut lazy_end, &mut inbox, &mut output);
            connections[1].flush();
            viewers.feed(&mut connections, &screen);
        }
        assert_eq!(screens, 2, "one screen when it joined, one when it read again");
        let text = String::from_utf8_lossy(&output);
        assert!(text.contains("this is line 39999") && !text.contains("line 39000"), "{text}");
        viewers.output(b"and on");
        viewers.feed(&mut connections, &screen);
        assert_eq!(read(&mut lazy_end, &mut inbox, &mut output), 0);
        assert!(output.ends_with(b"and on"), "it is live again");
    }

    #[test]
    fn a_viewer_that_disconnects_frees_its_place() {
        let screen = Screen::new(SIZE);
        let mut viewers = Viewers::default();
        let opened: Vec<_> = (0..MAX_VIEWERS as u64).map(open).collect();
        let (mut connections, ends): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        for id in 0..MAX_VIEWERS as u64 {
            viewers.add(ConnectionId(id), false).unwrap();
        }
        let refused = viewers.add(ConnectionId(99), false).unwrap_err();
        assert_eq!(refused.code, RefusalCode::TooManyViewers);
        viewers.add(ConnectionId(3), false).unwrap();
        connections.remove(0);
        drop(ends);
        viewers.feed(&mut connections, &screen);
        viewers.add(ConnectionId(99), false).unwrap();
    }
}
