//! Checkpoints in files: `checkpoint export`, `checkpoint import`; and `checkpoint consolidate`.
//!
//! The file is read and written here, with the rights of whoever typed the command; the daemon sees bytes only.

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

use crate::errors::{Exit, Failure};
use crate::output::progress::Progress;
use crate::output::{Facts, Format};
use crate::session::Session;
use crate::units::bytes;

/// A file that is there only once it is complete.
struct Draft {
    path: PathBuf,
    done: bool,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.done {
            // What cannot be removed is named after what it was to become.
            drop(fs::remove_file(&self.path));
        }
    }
}

fn failed(doing: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(Exit::Failed, "file_failed", format!("cannot {doing} {}: {error}", path.display()))
}

fn told(progress: &Progress, step: &str, done: u64, total: u64) {
    progress
        .watch(&Notification::new("$/progress", json!({"step": step, "done": done, "total": total, "unit": "bytes"})));
}

/// Writes a checkpoint to a file.
pub fn export(session: &mut Session, params: &CheckpointExport, file: &Path) -> Result<(), Failure> {
    if fs::symlink_metadata(file).is_ok() {
        let message = format!("{} is there already; an export replaces nothing", file.display());
        return Err(Failure::new(Exit::Failed, "file_exists", message).hint("name another file, or remove this one"));
    }
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    let path = PathBuf::from(name);
    // It holds the workspace's files: nobody else's business.
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let mut out = opened.map_err(|e| failed("create", &path, &e))?;
    let mut draft = Draft { path, done: false };

    let label = format!("export {}", params.project);
    let made = session.call_long(&label, params)?;
    let progress = Progress::begin(&label, session.out.format() == Format::Human);
    let (mut hash, mut offset) = (Sha256::new(), 0);
    while offset < made.bytes {
        let Bytes(piece) = session.call(&CheckpointDownload { offset })?.data;
        if piece.is_empty() {
            break;
        }
        out.write_all(&piece).map_err(|e| failed("write", &draft.path, &e))?;
        hash.update(&piece);
        offset += piece.len() as u64;
        told(&progress, "download", offset, made.bytes);
    }
    drop(progress);
    if hex(&hash.finalize()) != made.sha256 {
        let message = "what arrived is not what was exported; nothing was written";
        return Err(Failure::new(Exit::Failed, "garbled", message).hint("try again"));
    }
    out.sync_all().map_err(|e| failed("write", &draft.path, &e))?;
    // Unlike a rename, a link replaces nothing that somebody has put there meanwhile.
    match fs::hard_link(&draft.path, file) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(failed("create", file, &error)),
        // Not every file system has links.
        Err(_) => {
            fs::rename(&draft.path, file).map_err(|e| failed("create", file, &e))?;
            draft.done = true;
        }
    }
    drop(draft);
    let shown = json!({"file": file, "bytes": made.bytes, "sha256": made.sha256});
    session.out.one(&shown, Some(file.display().to_string()), |out, _| {
        let facts = Facts::default()
            .add("file", file.display().to_string())
            .add("size", bytes(made.bytes))
            .add("sha256", &made.sha256);
        out.facts(&facts)
    })?;
    Ok(())
}

/// Makes a checkpoint of a file.
pub fn import(session: &mut Session, project: ProjectName, file: &Path) -> Result<CheckpointCreateResult, Failure> {
    let mut from = File::open(file).map_err(|e| failed("open", file, &e))?;
    let about = from.metadata().map_err(|e| failed("open", file, &e))?;
    if !about.is_file() {
        return Err(Failure::new(Exit::Failed, "file_failed", format!("{} is no file", file.display())));
    }
    let label = format!("import {project}");
    let progress = Progress::begin(&label, session.out.format() == Format::Human);
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
        told(&progress, "upload", offset, about.len());
        if last {
            break;
        }
    }
    drop(progress);
    session.call_long(&label, &CheckpointImport { project, sha256: hex(&hash.finalize()) })
}

/// Has the packs of a project written as one.
pub fn consolidate(session: &mut Session, params: &CheckpointConsolidate) -> Result<(), Failure> {
    let result = session.call_long(&format!("consolidate {}", params.project), params)?;
    session.out.one(&result, None, |out, result| {
        if result.packs == 0 {
            return out.line(format!("nothing to do: the packs take {}", bytes(result.bytes)));
        }
        let facts = Facts::default()
            .add("packs", format!("{} became one", result.packs))
            .add("before", bytes(result.bytes_before))
            .add("after", bytes(result.bytes_after))
            .add("objects", format!("{}, {} of them as differences", result.objects, result.deltas))
            .add("history", bytes(result.bytes));
        out.facts(&facts)
    })?;
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
