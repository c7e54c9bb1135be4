//! Removes the files of checkpoints whose rows were removed, and frees their space.

use fermata_history::Extent;
use fermata_protocol::CheckpointNumber;

use crate::errors::Failure;
use crate::operations::StepContext;
use crate::operations::maintenance::storage::measure;
use crate::operations::maintenance::{consolidation, leftovers};

/// Removes the files and snapshots of checkpoints without a row, and requests a consolidation for the objects that only
/// they needed.
///
/// # Errors
/// When a file cannot be removed. May be tried again; the next start of the daemon removes what is left.
pub async fn discard(step: &StepContext, numbers: &[CheckpointNumber]) -> Result<(), Failure> {
    let before = step.history.used_bytes();
    leftovers::remove_rowless(step, numbers).await?;
    let after = measure(step).await?;
    step.history.reclaimed(before.saturating_sub(after));
    // Packs with objects of other checkpoints stay until a consolidation writes them without the unneeded ones.
    consolidation::request(step, Extent::Waste);
    Ok(())
}
