//! The agent's output: into the log, and onto its terminal.

use super::{Source, Supervisor};
use crate::intake::IntakeResult;
use crate::log_line::Stream;
use fermata_os::clock;

/// What a pipe may still hold when its end is no longer waited for, and more.
const LAST_BYTES: usize = 2 << 20;

impl Supervisor {
    pub(super) fn take_output(&mut self, ready: &[Source]) {
        let mut taken = false;
        for source in ready {
            taken |= match source {
                Source::Stdout => self.take_stdout() != IntakeResult::Nothing,
                Source::Stderr => {
                    self.intake.take(&mut self.stderr, Stream::Stderr, &mut self.log) != IntakeResult::Nothing
                }
                Source::Child
                | Source::Beginning
                | Source::Terminal
                | Source::Listener
                | Source::Freeze
                | Source::Connection(_) => false,
            };
        }
        if taken {
            self.log.flush(clock::unix_ns());
        }
    }

    /// Reads once. A terminal carries everything as standard output.
    fn take_stdout(&mut self) -> IntakeResult {
        let Self { intake, stdout, log, terminal, .. } = self;
        match terminal {
            Some(terminal) => intake.read_and_show(stdout, Stream::Stdout, log, |bytes| terminal.show(bytes)),
            None => intake.take(stdout, Stream::Stdout, log),
        }
    }

    /// Takes what is there now, at most about [`LAST_BYTES`] of each: somebody may still be writing.
    pub(super) fn drain_output(&mut self) {
        let mut taken = 0;
        while let IntakeResult::Bytes(count) = self.take_stdout() {
            taken += count;
            if taken >= LAST_BYTES {
                break;
            }
        }
        self.intake.drain(&mut self.stderr, Stream::Stderr, &mut self.log, LAST_BYTES);
        self.log.flush(clock::unix_ns());
    }
}
