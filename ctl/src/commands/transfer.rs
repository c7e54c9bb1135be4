//! `checkpoint export`, `checkpoint import` and `checkpoint consolidate`.
//!
//! This program reads and writes the file, with the permissions of its user; the daemon only sees bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use fermata_protocol::ProjectName;
use fermata_protocol::checkpoint::CheckpointCreateResult;
use fermata_protocol::rpc::Notification;
use fermata_protocol::terminal::Bytes;
use fermata_protocol::transfer::{
    CheckpointConsolidate, CheckpointDownload, CheckpointExport, CheckpointImport, CheckpointUpload, MAX_PIECE,
};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::errors::{CommandError, Exit};
use crate::output::progress::ProgressLine;
use crate::output::{FieldList, Format};
use crate::session::DaemonSession;
use crate::units::{bytes, hex, number};

/// A file under a temporary name, removed when dropped unless it was renamed.
struct PartialFile {
    path: PathBuf,
    renamed: bool,
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.renamed {
            // A file that cannot be removed has a name that tells what it is.
            drop(fs::remove_file(&self.path));
        }
    }
}

fn failed(doing: &str, path: &Path, error: &io::Error) -> CommandError {
    CommandError::new(Exit::Failed, "file_failed", format!("cannot {doing} {}: {error}", path.display()))
}

fn report_bytes(progress: &ProgressLine, step: &str, done: u64, total: u64) {
    progress
        .show(&Notification::new("$/progress", json!({"step": step, "done": done, "total": total, "unit": "bytes"})));
}

/// Writes a checkpoint to a new file.
pub fn export(session: &mut DaemonSession, params: &CheckpointExport, file: &Path) -> Result<(), CommandError> {
    if fs::symlink_metadata(file).is_ok() {
        let message = format!("{} already exists", file.display());
        return Err(
            CommandError::new(Exit::Failed, "file_exists", message).hint("give another file name, or remove the file")
        );
    }
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    let path = PathBuf::from(name);
    // Readable by its owner only: it contains the files of the workspace.
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let mut out = opened.map_err(|e| failed("create", &path, &e))?;
    let mut partial = PartialFile { path, renamed: false };

    let label = format!("export {}", params.project);
    let exported = session.call_long(&label, params)?;
    let progress = ProgressLine::begin(&label, session.out.format() == Format::Human);
    let (mut hash, mut offset) = (Sha256::new(), 0);
    while offset < exported.bytes {
        let Bytes(piece) = session.call(&CheckpointDownload { offset })?.data;
        if piece.is_empty() {
            break;
        }
        out.write_all(&piece).map_err(|e| failed("write", &partial.path, &e))?;
        hash.update(&piece);
        offset += piece.len() as u64;
        report_bytes(&progress, "download", offset, exported.bytes);
    }
    drop(progress);
    if hex(&hash.finalize()) != exported.sha256 {
        let message = "the downloaded data does not match its hash; nothing was written";
        return Err(CommandError::new(Exit::Failed, "garbled", message).hint("try again"));
    }
    out.sync_all().map_err(|e| failed("write", &partial.path, &e))?;
    // Unlike a rename, a hard link never replaces a file created meanwhile.
    match fs::hard_link(&partial.path, file) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(failed("create", file, &error)),
        // Not every file system supports hard links.
        Err(_) => {
            fs::rename(&partial.path, file).map_err(|e| failed("create", file, &e))?;
            partial.renamed = true;
        }
    }
    drop(partial);
    let shown = json!({"file": file, "bytes": exported.bytes, "sha256": exported.sha256});
    session.out.object(&shown, Some(file.display().to_string()), |out, _| {
        let fields = FieldList::default()
            .add("file", file.display().to_string())
            .add("size", bytes(exported.bytes))
            .add("sha256", &exported.sha256);
        out.fields(&fields)
    })?;
    Ok(())
}

pub fn import(
    session: &mut DaemonSession,
    project: ProjectName,
    file: &Path,
) -> Result<CheckpointCreateResult, CommandError> {
    let mut from = File::open(file).map_err(|e| failed("open", file, &e))?;
    let metadata = from.metadata().map_err(|e| failed("open", file, &e))?;
    if !metadata.is_file() {
        return Err(CommandError::new(
            Exit::Failed,
            "file_failed",
            format!("{} is not a regular file", file.display()),
        ));
    }
    let label = format!("import {project}");
    let progress = ProgressLine::begin(&label, session.out.format() == Format::Human);
    let (mut hash, mut offset) = (Sha256::new(), 0);
    loop {
        let mut piece = Vec::with_capacity(MAX_PIECE);
        (&mut from).take(MAX_PIECE as u64).read_to_end(&mut piece).map_err(|e| failed("read", file, &e))?;
        if piece.is_empty() && offset > 0 {
            break;
        }
        hash.update(&piece);
        let last = piece.is_empty();
        offset = session.call(&CheckpointUpload { offset, data: Bytes(piece) })?.bytes;
        report_bytes(&progress, "upload", offset, metadata.len());
        if last {
            break;
        }
    }
    drop(progress);
    session.call_long(&label, &CheckpointImport { project, sha256: hex(&hash.finalize()) })
}

pub fn consolidate(session: &mut DaemonSession, params: &CheckpointConsolidate) -> Result<(), CommandError> {
    let result = session.call_long(&format!("consolidate {}", params.project), params)?;
    session.out.object(&result, None, |out, result| {
        if result.packs == 0 {
            return out.line(format!("nothing to consolidate; the packs take {}", bytes(result.bytes)));
        }
        let fields = FieldList::default()
            .add("packs", format!("{} -> 1", result.packs))
            .add("size", format!("{} -> {}", bytes(result.bytes_before), bytes(result.bytes_after)))
            .add("objects", format!("{} ({} as deltas)", number(result.objects), number(result.deltas)))
            .add("total size", bytes(result.bytes));
        out.fields(&fields)
    })?;
    Ok(())
}
