//! The result of `checkpoint restore`, and what `checkpoint diff` shares with it: paths and tables of changes.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};

use fermata_protocol::ProjectName;
use fermata_protocol::checkpoint::{ChangeKind, ChangedPath, CheckpointRestoreResult};
use fermata_protocol::paths::escape;
use fermata_protocol::project::ProjectShow;

use super::pause::steps_text;
use crate::errors::CommandError;
use crate::output::{Cell, FieldList, Paint, Printer, TextTable};
use crate::session::DaemonSession;
use crate::units::{bytes, number};

/// Converts path arguments to paths relative to the workspace; absolute paths must be inside it.
pub(super) fn inside_workspace(
    session: &mut DaemonSession,
    project: &ProjectName,
    paths: &[OsString],
) -> Result<Vec<String>, CommandError> {
    let mut workspace = None;
    if paths.iter().any(|path| Path::new(path).is_absolute()) {
        workspace = Some(session.call(&ProjectShow { project: project.clone() })?.project.workspace);
    }
    paths.iter().map(|path| inside(workspace.as_deref(), path).map_err(CommandError::usage)).collect()
}

fn inside(workspace: Option<&str>, typed: &OsStr) -> Result<String, String> {
    if typed.is_empty() {
        return Err("a path is empty; write . for the whole workspace".to_owned());
    }
    let shown = typed.display();
    let path = match workspace.filter(|_| Path::new(typed).is_absolute()) {
        Some(workspace) => Path::new(typed)
            .strip_prefix(workspace)
            .map_err(|_| format!("the path {shown} is not in the workspace {workspace}"))?,
        None => Path::new(typed),
    };
    let mut names: Vec<&OsStr> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::CurDir => {}
            Component::ParentDir if names.pop().is_some() => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(format!("the path {shown} leads out of the workspace; paths are relative to it"));
            }
        }
    }
    if names.is_empty() {
        return Ok(".".to_owned());
    }
    let names: Vec<String> = names.into_iter().map(|name| escape(name.as_bytes())).collect();
    Ok(names.join("/"))
}

pub(super) fn change_table(changes: &[ChangedPath]) -> TextTable {
    let mut table = TextTable::new(&["CHANGE", ">BEFORE", ">AFTER", "PATH"]);
    let size = |size: Option<u64>| size.map(bytes).unwrap_or_default();
    for change in changes {
        let (word, paint) = match change.change {
            ChangeKind::Added => ("added", Paint::Good),
            ChangeKind::Removed => ("removed", Paint::Bad),
            ChangeKind::Modified => ("modified", Paint::Attention),
            ChangeKind::TypeChanged => ("type changed", Paint::Attention),
            ChangeKind::ModeChanged => ("mode changed", Paint::Attention),
            ChangeKind::AttributesChanged => ("attributes changed", Paint::Attention),
        };
        table.row([
            Cell::painted(word, paint),
            size(change.old_bytes).into(),
            size(change.new_bytes).into(),
            Cell::from(&change.path),
        ]);
    }
    table
}

/// Writes how many rows are not shown.
pub(super) fn print_remaining(out: &mut Printer, shown: usize, total: u64) -> io::Result<()> {
    match total.saturating_sub(shown as u64) {
        0 => Ok(()),
        left => out.line(format_args!("… and {} more", number(left))),
    }
}

/// Formats the totals of a list of changes.
pub(super) fn totals(changes: &[ChangedPath]) -> String {
    let count = |kind: fn(ChangeKind) -> bool| changes.iter().filter(|change| kind(change.change)).count();
    let added = count(|kind| kind == ChangeKind::Added);
    let removed = count(|kind| kind == ChangeKind::Removed);
    let before: u64 = changes.iter().filter_map(|change| change.old_bytes).sum();
    let after: u64 = changes.iter().filter_map(|change| change.new_bytes).sum();
    let changed = changes.len() - added - removed;
    format!("{changed} modified, {added} added, {removed} removed; {} -> {}", bytes(before), bytes(after))
}

pub(super) fn print_restore(out: &mut Printer, result: &CheckpointRestoreResult, dry_run: bool) -> io::Result<()> {
    if !result.changes.is_empty() {
        out.table(&change_table(&result.changes))?;
        print_remaining(out, result.changes.len(), result.changes_total)?;
        out.line("")?;
    }
    let (label, counts) = if dry_run {
        ("would restore", format!("{} to write, {} to remove", result.written, result.removed))
    } else {
        ("restored", format!("{} written, {} removed", result.written, result.removed))
    };
    let what = if result.paths.is_empty() { String::new() } else { format!(" (only {})", result.paths.join(", ")) };
    let fields = FieldList::default()
        .add(label, format!("checkpoint {}{what}", result.checkpoint_id))
        .add("paths", counts)
        .add_some("steps", steps_text(&result.steps_ms))
        .add_some("undo", result.undo.as_ref())
        .add_some("operation", result.operation_id.as_ref().map(|id| id.as_str()));
    out.fields(&fields)?;
    out.warnings(&result.warnings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt as _;

    #[test]
    fn paths_are_made_relative_to_the_workspace_and_keep_every_byte() {
        let inside = |workspace, typed: &[u8]| inside(workspace, &OsString::from_vec(typed.to_vec()));
        assert_eq!(inside(None, b"./src/../a%b\xff").unwrap(), "a%25b%FF");
        assert_eq!(inside(Some("/w"), b"/w/src/main.rs").unwrap(), "src/main.rs");
        assert_eq!(inside(Some("/w"), b"/w").unwrap(), ".");
        for (workspace, typed, why) in [
            (Some("/w"), &b"/wide/x"[..], "is not in the workspace /w"),
            (None, b"a/../../x", "leads out of the workspace"),
            // An unset variable must not select the whole workspace.
            (None, b"", "a path is empty"),
        ] {
            let error = inside(workspace, typed).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
