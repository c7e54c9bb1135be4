//! Handlers of checkpoints that leave and enter, and of consolidation.
//!
//! The client holds the file and sends or takes its bytes: a path that a client names could be one
//! that the daemon may open and the client may not. What is under way belongs to the connection and
//! goes with it; it has no name on the disk.

use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use fermata_core::command::Command;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::terminal::Bytes;
use fermata_protocol::transfer::{
    CheckpointConsolidate, CheckpointConsolidateResult, CheckpointDownload, CheckpointDownloadResult, CheckpointExport,
    CheckpointExportResult, CheckpointImport, CheckpointUpload, CheckpointUploadResult, MAX_PIECE,
};
use fermata_protocol::{Code, Refusal};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::checkpoints::find;
use super::connection::Connection;
use super::operations::{begin, watched, with_progress};
use super::reply::wire;
use super::transfer_files::{Sent, lock};
use crate::errors::Failure;
use crate::hashing::hex;
use crate::operations::checkpoint::transfer::{self, BundleFile};
use crate::operations::maintenance::consolidation;
use crate::operations::pause::validate;
use crate::operations::{Cancel, StepContext, blocking};
use crate::project::{Begin, Label, Projects, new_operation};
use crate::store::idempotency::Keyed;
use fermata_history::{Attempt, Consolidated, Extent};

pub(super) async fn export(connection: &Arc<Connection>, params: CheckpointExport) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    let view = find(&handle, params.checkpoint).await?;
    let operation = new_operation();
    // An export is no operation of the project: it changes nothing, and others go on beside it.
    let cancel = Cancel::default();
    let site = StepContext { cancel: cancel.clone(), ..handle.step_context() };
    let making = with_progress(connection, &operation, transfer::export(&site, view, &operation));
    tokio::pin!(making);
    let held = tokio::select! {
        held = &mut making => held?,
        () = connection.closed.cancelled() => {
            cancel.cancel();
            making.await?
        }
    };
    let result = CheckpointExportResult { bytes: held.bytes, sha256: held.sha256.clone() };
    *lock(&connection.transfers.exported) = Some(held);
    wire(&result)
}

pub(super) async fn download(connection: &Arc<Connection>, params: CheckpointDownload) -> Result<Value, Failure> {
    let held = lock(&connection.transfers.exported).clone().ok_or_else(|| {
        Refusal::new(Code::InvalidParams, "nothing was exported on this connection".to_owned())
            .hint("call checkpoint.export first, on the same connection")
    })?;
    let data = blocking("read the export", move || {
        let left = held.bytes.saturating_sub(params.offset).min(MAX_PIECE as u64);
        let mut data = vec![0; left as usize];
        held.file.read_exact_at(&mut data, params.offset).map_err(|e| Failure::fault("read the export", &e))?;
        Ok(data)
    })
    .await?;
    wire(&CheckpointDownloadResult { data: Bytes(data) })
}

pub(super) async fn upload(connection: &Arc<Connection>, params: CheckpointUpload) -> Result<Value, Failure> {
    let CheckpointUpload { offset, data: Bytes(data) } = params;
    if data.len() > MAX_PIECE {
        let message = format!("{} bytes are more than the {MAX_PIECE} that one call carries", data.len());
        return Err(Refusal::new(Code::TooLarge, message).into());
    }
    // Taken out while it is written: pieces that are sent side by side have no order.
    let before = lock(&connection.transfers.sent).take();
    let services = connection.daemon.projects.services();
    let (state, floor) = (services.paths.state.clone(), services.settings().pause.disk_floor_bytes);
    let sent = blocking("keep the file", move || {
        let failed = |e: io::Error| Failure::fault("keep the file that is being sent", &e);
        let mut sent = match before {
            _ if offset == 0 => {
                Sent { file: tempfile::tempfile_in(&state).map_err(failed)?, bytes: 0, hash: Sha256::new() }
            }
            Some(sent) if sent.bytes == offset => sent,
            Some(_) | None => {
                let message = format!("byte {offset} does not follow what was sent on this connection");
                return Err(Refusal::new(Code::InvalidParams, message).hint("begin again at offset 0").into());
            }
        };
        validate::check_free_space(&state, floor, data.len() as u64)?;
        sent.file.write_all(&data).map_err(failed)?;
        sent.hash.update(&data);
        sent.bytes += data.len() as u64;
        Ok(sent)
    })
    .await?;
    let bytes = sent.bytes;
    *lock(&connection.transfers.sent) = Some(sent);
    wire(&CheckpointUploadResult { bytes })
}

pub(super) async fn import(
    connection: &Arc<Connection>,
    params: CheckpointImport,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    let held = match &*lock(&connection.transfers.sent) {
        Some(sent) => {
            let file = sent.file.try_clone().map_err(|e| Failure::fault("open the file that was sent", &e))?;
            BundleFile { file: Arc::new(file), bytes: sent.bytes, sha256: hex(&sent.hash.clone().finalize()) }
        }
        None => {
            let message = "no file was sent on this connection".to_owned();
            return Err(Refusal::new(Code::InvalidParams, message).hint("send it with checkpoint.upload").into());
        }
    };
    if held.sha256 != params.sha256 {
        let message = format!("the file that was sent has the SHA-256 {}, not {}", held.sha256, params.sha256);
        return Err(Refusal::new(Code::BundleRefused, message).hint("send it again").into());
    }
    let operation = new_operation();
    let command = Command::Checkpoint { operation: operation.clone(), trigger: Trigger::Manual };
    let label = Label { import: Some(held), ..Label::default() };
    watched(connection, &handle, Begin { label, ..begin(command, operation, keyed) }).await
}

pub(super) async fn consolidate(all: &Projects, params: CheckpointConsolidate) -> Result<Value, Failure> {
    let handle = all.get(&params.project)?;
    let site = StepContext { cancel: Cancel::default(), ..handle.step_context() };
    let doing = "consolidate the history";
    let permit = site.services.background.acquire().await.map_err(|e| Failure::fault(doing, &e))?;
    let extent = if params.everything { Extent::Everything } else { Extent::Fresh };
    let done = match consolidation::consolidate(&site, extent).await? {
        Attempt::Done(done) => done,
        Attempt::Nothing(_) | Attempt::Busy => Consolidated::default(),
    };
    drop(permit);
    let stats = site.with_history(None, doing, |history, _, _| history.pack_stats()).await?;
    wire(&CheckpointConsolidateResult {
        packs: done.packs,
        bytes_before: done.bytes_before,
        bytes_after: done.bytes_after,
        objects: done.objects,
        deltas: done.deltas,
        bytes: stats.bytes,
    })
}
