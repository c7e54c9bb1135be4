//! Turns the progress of work on files into the notes that clients get while they follow an operation.

use fermata_protocol::OperationId;

use crate::services::ProgressNote;

/// Returns the name of a phase and the unit that is counted in it.
pub(super) fn step_and_unit(phase: fermata_history::StorePhase) -> (&'static str, &'static str) {
    match phase {
        fermata_history::StorePhase::Scan => ("scan", "paths"),
        fermata_history::StorePhase::Read => ("read", "files"),
        fermata_history::StorePhase::Trees => ("trees", "directories"),
        fermata_history::StorePhase::Pack => ("pack", "objects"),
        fermata_history::StorePhase::Verify => ("verify", "objects"),
        fermata_history::StorePhase::Apply => ("apply", "paths"),
        fermata_history::StorePhase::Recheck => ("recheck", "paths"),
    }
}

pub(super) fn note(operation: &OperationId, progress: fermata_history::StoreProgress) -> ProgressNote {
    let (step, unit) = step_and_unit(progress.phase);
    ProgressNote {
        operation_id: operation.clone(),
        step: step.to_owned(),
        done: progress.done,
        total: progress.total,
        unit,
    }
}

/// Makes a note of work that is counted in bytes.
pub(super) fn note_bytes(operation: OperationId, step: &str, done: u64, total: u64) -> ProgressNote {
    ProgressNote { operation_id: operation, step: step.to_owned(), done, total, unit: "bytes" }
}
