//! The attachments to agents' terminals, and which one of them is the writer of each terminal.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fermata_protocol::supervision::TerminalSize;
use fermata_protocol::terminal::MAX_TERMINAL_SIDE;
use fermata_protocol::{Code, Refusal, RunId, Target};
use tokio::sync::watch;

use crate::shims::viewing::Typing;

/// A client's connection attached to a terminal.
pub struct Attachment {
    /// Unique among all attachments of this daemon.
    pub(super) key: u64,
    pub(super) target: Target,
    pub(super) run: RunId,
    pub(super) by: String,
    pub(super) read_only: bool,
    pub(super) typing: Typing,
    /// The principal that has taken over writing.
    pub(super) replaced: watch::Sender<Option<String>>,
}

/// The writer of each terminal, by run.
#[derive(Default)]
pub struct Terminals {
    writers: Mutex<BTreeMap<RunId, Arc<Attachment>>>,
}

/// The result of a request to become the writer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The attachment was the writer already.
    Had,
    /// The attachment is the writer from now on.
    Got,
    /// This principal is the writer.
    Taken(String),
}

impl Terminals {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<RunId, Arc<Attachment>>> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn claim(&self, attachment: &Arc<Attachment>, steal: bool) -> Claim {
        let mut writers = self.lock();
        match writers.get(&attachment.run) {
            Some(writer) if writer.key == attachment.key => return Claim::Had,
            Some(writer) if !steal => return Claim::Taken(writer.by.clone()),
            Some(writer) => {
                writer.replaced.send_replace(Some(attachment.by.clone()));
            }
            None => {}
        }
        writers.insert(attachment.run.clone(), Arc::clone(attachment));
        Claim::Got
    }

    pub(super) fn writer(&self, run: &RunId) -> Option<String> {
        self.lock().get(run).map(|writer| writer.by.clone())
    }

    pub(super) fn writes(&self, attachment: &Attachment) -> bool {
        self.lock().get(&attachment.run).is_some_and(|writer| writer.key == attachment.key)
    }

    pub(super) fn leave(&self, attachment: &Attachment) {
        let mut writers = self.lock();
        if writers.get(&attachment.run).is_some_and(|writer| writer.key == attachment.key) {
            writers.remove(&attachment.run);
        }
    }
}

/// Refuses sizes that no terminal has.
///
/// # Errors
/// `invalid_params`.
pub(super) fn check_size(size: TerminalSize) -> Result<(), Refusal> {
    let fits = |side: u16| (1..=MAX_TERMINAL_SIDE).contains(&side);
    if fits(size.rows) && fits(size.cols) {
        return Ok(());
    }
    Err(Refusal::new(
        Code::InvalidParams,
        format!("a terminal has 1 to {MAX_TERMINAL_SIDE} rows and columns, not {} x {}", size.rows, size.cols),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_nothing_and_of_too_much_are_refused() {
        assert!(check_size(TerminalSize { rows: 1, cols: MAX_TERMINAL_SIDE }).is_ok());
        for (rows, cols) in [(0, 80), (24, 0), (MAX_TERMINAL_SIDE + 1, 80)] {
            let refusal = check_size(TerminalSize { rows, cols }).expect_err("refused");
            assert_eq!(refusal.code, Code::InvalidParams);
        }
    }
}
