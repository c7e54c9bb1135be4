//! Reads the agent's output into the log and onto its terminal.

use super::{AgentSupervisor, PollSource};
use crate::intake::IntakeResult;
use crate::log_line::Stream;
use fermata_os::clock;

/// More than a pipe can contain.
const LAST_BYTES: usize = 2 << 20;

impl AgentSupervisor {
    pub(super) fn take_output(&mut self, ready: &[PollSource]) {
        let mut taken = false;
        for source in ready {
            taken |= match source {
                PollSource::Stdout => self.take_stdout() != IntakeResult::Nothing,
                PollSource::Stderr => {
                    self.intake.take(&mut self.stderr, Stream::Stderr, &mut self.log) != IntakeResult::Nothing
                }
                PollSource::Child
                | PollSource::PreStart
                | PollSource::Terminal
                | PollSource::Listener
                | PollSource::Freeze
                | PollSource::Connection(_) => false,
            };
        }
        if taken {
            self.log.flush(clock::unix_ns());
        }
    }

    /// Reads standard output once. A terminal carries all output as standard output.
    fn take_stdout(&mut self) -> IntakeResult {
        let Self { intake, stdout, log, terminal, .. } = self;
        match terminal {
            Some(terminal) => intake.read_and_show(stdout, Stream::Stdout, log, |bytes| terminal.show(bytes)),
            None => intake.take(stdout, Stream::Stdout, log),
        }
    }

    /// Reads the available output, at most about [`LAST_BYTES`] of each stream, since a process may still be writing.
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
