//! Counts the costs of a daemon from outside: the files it flushes, through a preloaded library, and the transactions
//! it commits, from the write-ahead log of its database.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::sandbox::{Sandbox, SandboxBuilder};
use crate::waiting::{SOON, wait_until};

/// The record of the files that a sandbox's daemon flushes.
#[derive(Debug)]
pub struct Recorder {
    dir: tempfile::TempDir,
    /// The number of lines of the record that were returned already.
    returned: Cell<usize>,
}

impl Recorder {
    /// Compiles the library and lets the builder's daemon load it.
    ///
    /// # Panics
    /// When there is no C compiler.
    pub fn preload(builder: SandboxBuilder) -> (Self, SandboxBuilder) {
        let dir = tempfile::Builder::new().prefix("recorder").tempdir().expect("create a temporary directory");
        let recorder = Self { dir, returned: Cell::new(0) };
        let library = recorder.path("recorder.so");
        let output = Command::new("cc")
            .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o"])
            .args([&library, &Path::new(env!("CARGO_MANIFEST_DIR")).join("src/recorder.c")])
            .output()
            .expect("cc is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = |path: PathBuf| path.into_os_string().into_string().expect("a temporary name is ASCII");
        let builder =
            builder.env("LD_PRELOAD", &text(library)).env("FERMATA_TEST_FLUSHES", &text(recorder.path("flushes")));
        (recorder, builder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the files that were flushed since the last call, sorted, as paths relative to the sandbox's directory.
    /// `*` replaces the parts of names that differ in every run.
    pub fn flushed(&self, sandbox: &Sandbox) -> Vec<String> {
        let all = self.all(sandbox);
        let mut new = all[self.returned.replace(all.len())..].to_vec();
        new.sort();
        new
    }

    /// Waits until a file or directory has been flushed.
    #[track_caller]
    pub fn wait_for(&self, sandbox: &Sandbox, path: &str) {
        wait_until(SOON, &format!("{path} to be flushed"), || self.all(sandbox).iter().any(|one| one == path));
    }

    fn all(&self, sandbox: &Sandbox) -> Vec<String> {
        let text = fs::read_to_string(self.path("flushes")).unwrap_or_default();
        let below = |path| Path::new(path).strip_prefix(sandbox.path()).unwrap_or(Path::new(path));
        text.lines().map(|path| shape(below(path))).collect()
    }
}

/// Replaces names that differ in every run: those of packs, of staging directories of snapshots and of temporary
/// files.
fn shape(path: &Path) -> String {
    let shown = |name: &str| {
        let is_draft = name.contains('-') && name.chars().all(|c| c.is_ascii_digit() || c == '-');
        let prefix = ["pack-", ".fermata-restore-", ".restore-"].into_iter().find(|prefix| name.starts_with(prefix));
        match (prefix, name.rsplit_once('.')) {
            (Some("pack-"), Some((_, end))) => format!("pack-*.{end}"),
            (Some(prefix), _) => format!("{prefix}*"),
            (None, _) if is_draft => "*".to_owned(),
            (None, _) => name.to_owned(),
        }
    };
    let names = path.iter().map(|name| shown(&name.to_string_lossy()));
    names.collect::<Vec<_>>().join("/")
}

/// Counts the transactions in the write-ahead log of the database: the frames that record the size of the database.
///
/// # Panics
/// When the log cannot be read.
pub fn commits(sandbox: &Sandbox) -> usize {
    const HEADER: usize = 32;
    const FRAME_HEADER: usize = 24;
    let log = fs::read(sandbox.state_dir().join("fermata.sqlite-wal")).expect("read the log of the database");
    let page_size = u32::from_be_bytes(log[8..12].try_into().expect("four bytes")) as usize;
    let frames = log[HEADER..].chunks_exact(FRAME_HEADER + page_size);
    // Frames with other salts remain from an earlier use of the log file.
    let current = frames.take_while(|frame| frame[8..16] == log[16..24]);
    current.filter(|frame| frame[4..8] != [0; 4]).count()
}
