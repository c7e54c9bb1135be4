//! The NDJSON line codec: bytes in, whole lines out, never more memory than the limit.

use thiserror::Error;

/// A line grew past the limit before its newline came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a line is longer than {limit} bytes")]
pub struct LineTooLong {
    /// The limit in bytes, newline excluded.
    pub limit: usize,
}

/// Collects bytes and hands out lines, without their newline (and a carriage return before it).
#[derive(Debug)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// How far `bytes` was searched for a newline, so that no byte is searched twice.
    searched: usize,
    /// Where the first line that was not handed out begins.
    start: usize,
    limit: usize,
}

impl LineBuffer {
    /// Makes an empty buffer for lines of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), searched: 0, start: 0, limit }
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.searched -= self.start;
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next whole line, `None` when there is none yet.
    ///
    /// # Errors
    /// When the line is longer than the limit, whole or not; the peer is then out of step and
    /// the connection has to end.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineTooLong> {
        let newline = self.bytes[self.searched..].iter().position(|&b| b == b'\n');
        let Some(offset) = newline else {
            self.searched = self.bytes.len();
            let pending = self.bytes.len() - self.start;
            // One more byte may still be the carriage return.
            return if pending > self.limit + 1 { Err(LineTooLong { limit: self.limit }) } else { Ok(None) };
        };
        let end = self.searched + offset;
        let mut line = &self.bytes[self.start..end];
        if let [rest @ .., b'\r'] = line {
            line = rest;
        }
        if line.len() > self.limit {
            return Err(LineTooLong { limit: self.limit });
        }
        let line = line.to_vec();
        self.start = end + 1;
        self.searched = self.start;
        Ok(Some(line))
    }

    /// Says whether a whole line waits.
    pub fn has_line(&self) -> bool {
        self.bytes[self.start..].contains(&b'\n')
    }

    /// Says how many bytes wait for their newline.
    pub fn pending(&self) -> usize {
        self.bytes.len() - self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_however_the_bytes_arrive() {
        let text = b"one\ntwo\r\n\nfour";
        for chunk in 1..text.len() {
            let mut buffer = LineBuffer::new(10);
            let mut lines = Vec::new();
            for piece in text.chunks(chunk) {
                buffer.push(piece);
                while let Some(line) = buffer.next_line().expect("short lines") {
                    lines.push(line);
                }
            }
            assert_eq!(lines, [b"one".to_vec(), b"two".to_vec(), b"".to_vec()]);
            assert_eq!(buffer.pending(), 4);
        }
    }

    #[test]
    fn a_long_line_is_refused_before_it_is_whole() {
        let mut buffer = LineBuffer::new(4);
        buffer.push(b"12345");
        assert_eq!(buffer.next_line(), Ok(None));
        buffer.push(b"6");
        assert_eq!(buffer.next_line(), Err(LineTooLong { limit: 4 }));
        let mut buffer = LineBuffer::new(4);
        buffer.push(b"1234\n12345\n");
        assert!(buffer.has_line());
        assert_eq!(buffer.next_line(), Ok(Some(b"1234".to_vec())));
        assert_eq!(buffer.next_line(), Err(LineTooLong { limit: 4 }));
    }
}
