//! Handlers of the export, import and consolidation of checkpoints.
//!
//! The client opens the file, and its bytes go over the connection: the daemon might be allowed to open a path that
//! the client may not. The daemon's copy is an unnamed temporary file that belongs to the connection.

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
use super::connection::ClientConnection;
use super::operations::{begin, watched, with_progress};
use super::reply::wire;
use super::transfer_files::{UploadedFile, lock};
use crate::errors::Failure;
use crate::hashing::hex;
use crate::operations::checkpoint::transfer::{self, BundleFile};
use crate::operations::maintenance::consolidation;
use crate::operations::pause::validate;
use crate::operations::{Cancel, StepContext, blocking};
use crate::project::{Begin, Label, Projects, new_operation};
use crate::store::idempotency::Keyed;
use fermata_history::{Attempt, Consolidated, Extent};

pub(super) async fn export(connection: &Arc<ClientConnection>, params: CheckpointExport) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    let view = find(&handle, params.checkpoint).await?;
    let operation = new_operation();
    // It only reads, so it is no operation of the project.
    let cancel = Cancel::default();
    let step = StepContext { cancel: cancel.clone(), ..handle.step_context() };
    let making = with_progress(connection, &operation, transfer::export(&step, view, &operation));
    tokio::pin!(making);
    let bundle = tokio::select! {
        made = &mut making => made?,
        () = connection.closed.cancelled() => {
            cancel.cancel();
            making.await?
        }
    };
    let result = CheckpointExportResult { bytes: bundle.bytes, sha256: bundle.sha256.clone() };
    *lock(&connection.transfers.exported) = Some(bundle);
    wire(&result)
}

pub(super) async fn download(connection: &Arc<ClientConnection>, params: CheckpointDownload) -> Result<Value, Failure> {
    let bundle = lock(&connection.transfers.exported).clone().ok_or_else(|| {
        Refusal::new(Code::InvalidParams, "nothing was exported on this connection".to_owned())
            .hint("call checkpoint.export first, on the same connection")
    })?;
    let data = blocking("read the export", move || {
        let left = bundle.bytes.saturating_sub(params.offset).min(MAX_PIECE as u64);
        let mut data = vec![0; left as usize];
        bundle.file.read_exact_at(&mut data, params.offset).map_err(|e| Failure::fault("read the export", &e))?;
        Ok(data)
    })
    .await?;
    wire(&CheckpointDownloadResult { data: Bytes(data) })
}

pub(super) async fn upload(connection: &Arc<ClientConnection>, params: CheckpointUpload) -> Result<Value, Failure> {
    let CheckpointUpload { offset, data: Bytes(data) } = params;
    if data.len() > MAX_PIECE {
        let message = format!("'data' has {} bytes, more than the {MAX_PIECE} of one call", data.len());
        return Err(Refusal::new(Code::TooLarge, message).into());
    }
    // Taken out while it is written to: concurrent uploads on one connection are refused, since they have no order.
    let before = lock(&connection.transfers.uploaded).take();
    let services = connection.daemon.projects.services();
    let (state, floor) = (services.paths.state.clone(), services.settings().pause.disk_floor_bytes);
    let file = blocking("write the uploaded file", move || {
        let failed = |e: io::Error| Failure::fault("write the uploaded file", &e);
        let mut file = match before {
            _ if offset == 0 => {
                UploadedFile { file: tempfile::tempfile_in(&state).map_err(failed)?, bytes: 0, hash: Sha256::new() }
            }
            Some(file) if file.bytes == offset => file,
            Some(_) | None => {
                let message = format!("offset {offset} is not the end of the file uploaded on this connection");
                return Err(Refusal::new(Code::InvalidParams, message).hint("begin again at offset 0").into());
            }
        };
        validate::check_free_space(&state, floor, data.len() as u64)?;
        file.file.write_all(&data).map_err(failed)?;
        file.hash.update(&data);
        file.bytes += data.len() as u64;
        Ok(file)
    })
    .await?;
    let bytes = file.bytes;
    *lock(&connection.transfers.uploaded) = Some(file);
    wire(&CheckpointUploadResult { bytes })
}

pub(super) async fn import(
    connection: &Arc<ClientConnection>,
    params: CheckpointImport,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    let bundle = match &*lock(&connection.transfers.uploaded) {
        Some(uploaded) => {
            let file = uploaded.file.try_clone().map_err(|e| Failure::fault("open the uploaded file", &e))?;
            BundleFile { file: Arc::new(file), bytes: uploaded.bytes, sha256: hex(&uploaded.hash.clone().finalize()) }
        }
        None => {
            let message = "no file was uploaded on this connection".to_owned();
            return Err(Refusal::new(Code::InvalidParams, message).hint("call checkpoint.upload first").into());
        }
    };
    if bundle.sha256 != params.sha256 {
        let message = format!("the uploaded file has the SHA-256 {}, not {}", bundle.sha256, params.sha256);
        return Err(Refusal::new(Code::BundleRefused, message).hint("upload it again").into());
    }
    let operation = new_operation();
    let command = Command::Checkpoint { operation: operation.clone(), trigger: Trigger::Manual };
    let label = Label { import: Some(bundle), ..Label::default() };
    watched(connection, &handle, Begin { label, ..begin(command, operation, keyed) }).await
}

pub(super) async fn consolidate(all: &Projects, params: CheckpointConsolidate) -> Result<Value, Failure> {
    let handle = all.get(&params.project)?;
    let step = StepContext { cancel: Cancel::default(), ..handle.step_context() };
    let doing = "consolidate the history";
    let permit = step.services.background.acquire().await.map_err(|e| Failure::fault(doing, &e))?;
    let extent = if params.everything { Extent::Everything } else { Extent::Fresh };
    let done = match consolidation::consolidate(&step, extent).await? {
        Attempt::Done(done) => done,
        Attempt::Nothing(_) | Attempt::Busy => Consolidated::default(),
    };
    drop(permit);
    let stats = step.with_history(None, doing, |history, _, _| history.pack_stats()).await?;
    wire(&CheckpointConsolidateResult {
        packs: done.packs,
        bytes_before: done.bytes_before,
        bytes_after: done.bytes_after,
        objects: done.objects,
        deltas: done.deltas,
        bytes: stats.bytes,
    })
}
