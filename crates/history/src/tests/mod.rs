//! Tests of the checkpoint store with real files, and with the real git for comparison.

mod costs;
mod coverage;
mod exact;
mod ignoring;
mod import;
mod packs;
mod random;
mod repositories;
mod restoring;
mod safety;
mod store;
mod user_index;
mod watching;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use sha1::{Digest, Sha1};

use super::*;

/// A store and a workspace that are removed with the test.
pub(super) struct Sandbox {
    dir: tempfile::TempDir,
    pub history: History,
    pub rules: Rules,
}

pub(super) static NEVER: AtomicBool = AtomicBool::new(false);

pub(super) fn quiet(_: StoreProgress) {}

pub(super) fn rel(path: &str) -> RelPath {
    RelPath::new(path).unwrap()
}

impl Sandbox {
    pub fn new() -> Sandbox {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("work")).unwrap();
        let watcher = FileWatcher::start(&dir.path().join("cookies")).unwrap();
        let history = History::open_watched(&dir.path().join("state"), Some(&watcher)).unwrap();
        Sandbox { dir, history, rules: Rules::default() }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    pub fn outside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn at(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.path().join(name.as_ref())
    }

    pub fn write(&self, name: impl AsRef<OsStr>, content: impl AsRef<[u8]>) {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub fn git(&self, args: &[&str]) -> Vec<u8> {
        git_in(&self.path(), args)
    }

    pub fn request(&self, number: u64) -> SnapshotRequest {
        SnapshotRequest {
            workspace: self.path(),
            number,
            message: format!("checkpoint {number}"),
            parent: None,
            rules: self.rules.clone(),
            mapped: Mapped::default(),
            full_scan_after: None,
        }
    }

    pub fn take(&self, number: u64) -> Snapshot {
        self.history.snapshot(&self.request(number), 1_700_000_000_000 + number as i64, &quiet, &NEVER).unwrap()
    }

    pub fn checkpoint(&self, number: u64) -> Snapshot {
        let snapshot = self.take(number);
        self.history.publish(&snapshot).unwrap();
        snapshot
    }

    pub fn planned(&self, number: u64, safety: Option<u64>, paths: Option<&[RelPath]>) -> Planned {
        let workspace = self.path();
        let request = RestoreOptions { number, safety, workspace: &workspace, rules: &self.rules, paths };
        self.history.plan_restore(&request, &quiet, &NEVER).unwrap()
    }

    pub fn plan(&self, number: u64, safety: u64, paths: Option<&[RelPath]>) -> RestorePlan {
        let plan = self.planned(number, Some(safety), paths).plan;
        // A plan is serialised between planning and applying.
        let read: RestorePlan = serde_json::from_str(&serde_json::to_string(&plan).unwrap()).unwrap();
        assert_eq!(read, plan);
        read
    }

    pub fn restore(&self, number: u64, safety: u64) -> RestoreReport {
        self.checkpoint(safety);
        let plan = self.plan(number, safety, None);
        self.history.apply_restore(&plan, &quiet).unwrap()
    }

    pub fn restore_cleanly(&self, number: u64, safety: u64) {
        let report = self.restore(number, safety);
        assert_eq!(report.mismatches, []);
        assert_eq!(report.conflicts, []);
    }

    pub fn covered(&self, number: u64) -> Vec<String> {
        let listing = self.history.listing_of(number).unwrap();
        let files =
            listing.items.iter().filter(|(_, item)| item.content != crate::tree::listing::ItemContent::Directory);
        files.map(|(path, _)| path.to_string()).collect()
    }

    /// Waits until all files written so far are old enough for their fingerprints to be reliable.
    pub fn let_files_age(&self) {
        // The clock of the file system lags behind this one.
        let grain = std::time::Duration::from_nanos(crate::tree::fingerprint::TICK_NS as u64 + 1);
        let written = std::time::SystemTime::now();
        while std::time::SystemTime::now() <= written + grain {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

pub(super) fn git_in(dir: &Path, args: &[&str]) -> Vec<u8> {
    let output = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "safe.directory=*", "-c", "init.defaultBranch=main"])
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env_remove("GIT_DIR")
        .output()
        .unwrap();
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Lists a directory and everything below it.
pub(super) fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![dir.to_owned()];
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

pub(super) type FilesOnDisk = BTreeMap<String, (u32, i64, i64, Vec<u8>)>;

/// Describes a directory completely: modes, times and contents.
pub(super) fn files_on_disk(dir: &Path) -> FilesOnDisk {
    let one = |path: PathBuf| {
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = match meta.file_type() {
            // Long contents are represented by their hash.
            kind if kind.is_file() && meta.len() > 4_096 => Sha1::digest(fs::read(&path).unwrap()).to_vec(),
            kind if kind.is_file() => fs::read(&path).unwrap(),
            kind if kind.is_symlink() => fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let name = path.strip_prefix(dir).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
        (name, (meta.mode(), meta.mtime(), meta.mtime_nsec(), content))
    };
    walk(dir).into_iter().map(one).collect()
}

/// Properties that `FilesOnDisk` leaves out: extended attributes, the other names of a file, and whether it has
/// holes.
pub(super) type Finer = BTreeMap<String, (Vec<(Vec<u8>, Vec<u8>)>, Vec<String>, bool)>;

/// Returns these properties for every path of a workspace.
pub(super) fn finer(dir: &Path) -> Finer {
    let shown = |path: &Path| path.strip_prefix(dir).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
    let mut names: BTreeMap<(u64, u64), Vec<String>> = BTreeMap::new();
    let paths: Vec<_> = walk(dir).into_iter().map(|path| (fs::symlink_metadata(&path).unwrap(), path)).collect();
    for (meta, path) in paths.iter().filter(|(meta, _)| meta.is_file()) {
        names.entry((meta.dev(), meta.ino())).or_default().push(shown(path));
    }
    let one = |(meta, path): &(fs::Metadata, PathBuf)| {
        let attributes = if meta.is_file() || meta.is_dir() {
            let pairs = crate::tree::xattrs::read(fs::File::open(path).unwrap()).unwrap();
            pairs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
        } else {
            Vec::new()
        };
        let linked = names.get(&(meta.dev(), meta.ino())).filter(|_| meta.is_file()).cloned().unwrap_or_default();
        (shown(path), (attributes, linked, meta.is_file() && meta.blocks() * 512 < meta.size()))
    };
    paths.iter().map(one).collect()
}

/// Sets an extended attribute, or removes it.
pub(super) fn set_xattr(path: &Path, name: &str, value: Option<&[u8]>) {
    match value {
        Some(value) => rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap(),
        None => rustix::fs::removexattr(path, name).unwrap(),
    }
}

/// Sets the modification time in nanoseconds since 1970.
pub(super) fn set_mtime(path: &Path, ns: u64) {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(ns);
    fs::File::open(path).unwrap().set_modified(time).unwrap();
}

/// The files of a workspace without `.git`.
pub(super) fn files_without_git(dir: &Path) -> FilesOnDisk {
    let mut files = files_on_disk(dir);
    files.retain(|name, _| !name.split('/').any(|part| part == ".git"));
    files
}

pub(super) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
