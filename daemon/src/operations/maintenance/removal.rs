//! Removes the files of checkpoints whose rows are gone, and gives their room back.

use fermata_history::Extent;
use fermata_protocol::CheckpointNumber;

use crate::errors::Failure;
use crate::operations::StepContext;
use crate::operations::maintenance::storage::measure;
use crate::operations::maintenance::{consolidation, leftovers};

/// Removes the files and snapshots of checkpoints that have no row any more, and gives the room back that
/// nobody else needs.
///
/// # Errors
/// When something cannot be removed; it may be tried again, and the next start sweeps it.
pub async fn discard(site: &StepContext, numbers: &[CheckpointNumber]) -> Result<(), Failure> {
    let before = site.history.used_bytes();
    leftovers::remove_rowless(site, numbers).await?;
    let after = measure(site).await?;
    site.history.reclaimed(before.saturating_sub(after));
    // Packs in which others have contents stay; what nobody needs in them goes with time.
    consolidation::request(site, Extent::Waste);
    Ok(())
}
