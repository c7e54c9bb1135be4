//! Handlers of `checkpoint.remove` and `checkpoint.prune`.

use fermata_core::retention::{RemovalBounds, RemovalRequest};
use fermata_protocol::retention::{CheckpointPrune, CheckpointRemove};
use fermata_protocol::{Code, Refusal};
use serde_json::Value;

use super::reply::wire;
use crate::errors::Failure;
use crate::project::{Projects, Retain};
use crate::store::idempotency::Keyed;

pub(super) async fn remove(
    projects: &Projects,
    params: CheckpointRemove,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    if params.checkpoints.is_empty() {
        return Err(Refusal::new(Code::InvalidParams, "'checkpoints' is empty")
            .hint(format!("fermatactl checkpoint ls {}", params.project))
            .into());
    }
    handle.retain(Retain { ask: RemovalRequest::These(params.checkpoints), keyed }).await
}

pub(super) async fn prune(
    projects: &Projects,
    params: &CheckpointPrune,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let bounds = RemovalBounds { keep: params.keep, older_than_ms: params.older_than_ms, max_bytes: params.max_bytes };
    let ask = match bounds == RemovalBounds::default() {
        true => RemovalRequest::Policy(handle.step_context().retention()),
        false => RemovalRequest::Bounds(bounds),
    };
    match params.dry_run {
        true => wire(&handle.would_remove(&ask).await?),
        false => handle.retain(Retain { ask, keyed }).await,
    }
}
