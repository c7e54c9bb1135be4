//! Profiles of tools: how to recognise a tool, where its session files are, how to start it so that it continues a
//! session.
//!
//! Shipped profiles are embedded; a user's profile of the same name replaces them. This module only reads files.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use fermata_core::resume_command::ResumeTemplate;
use serde::Deserialize;
use thiserror::Error;

const SHIPPED: &[(&str, &str)] =
    &[("codex", include_str!("../../profiles/codex.toml")), ("claude", include_str!("../../profiles/claude.toml"))];

/// The most directories that a search for session files reads.
const MAX_DIRECTORIES: usize = 20_000;

/// How much of a session file is searched for the working directory, in bytes.
const HEAD_BYTES: usize = 64 << 10;

/// Why a profile cannot be used.
#[derive(Debug, Error)]
pub enum ProfileError {
    #[error("read the profile {}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The cause names line and key.
    #[error("parse the profile {}", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// The profile of one tool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// File names of the program.
    pub programs: Vec<String>,
    #[serde(default)]
    pub session: Option<SessionFiles>,
    /// The command that continues a session.
    #[serde(default)]
    pub resume: Option<ResumeTemplate>,
}

/// The location and the names of a tool's session files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionFiles {
    /// The directory; `${VAR:-default}` and a leading `~` are expanded with the agent's environment.
    pub directory: String,
    /// What the files' names begin with.
    #[serde(default)]
    pub prefix: String,
    /// What the files' names end with.
    pub suffix: String,
    /// The number of characters before the suffix that are the session's id; all between prefix and suffix when left out.
    #[serde(default)]
    pub id_length: Option<usize>,
}

/// A session of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    pub id: String,
    pub file: PathBuf,
}

/// All profiles, by name.
#[derive(Debug, Clone, Default)]
pub struct Profiles {
    by_name: BTreeMap<String, Profile>,
}

impl Profiles {
    /// Loads the shipped profiles, then the user's.
    ///
    /// # Errors
    /// A user's profile cannot be read or is not valid.
    pub fn load(directory: &Path) -> Result<Self, ProfileError> {
        let mut by_name = BTreeMap::new();
        for (name, text) in SHIPPED {
            by_name.insert((*name).to_owned(), parse(Path::new(name), text)?);
        }
        let entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self { by_name }),
            Err(source) => return Err(ProfileError::Unreadable { path: directory.to_owned(), source }),
        };
        for entry in entries {
            let path = entry.map_err(|source| ProfileError::Unreadable { path: directory.to_owned(), source })?.path();
            if path.extension() != Some(OsStr::new("toml")) {
                continue;
            }
            let text = std::fs::read_to_string(&path)
                .map_err(|source| ProfileError::Unreadable { path: path.clone(), source })?;
            if let Some(name) = path.file_stem().and_then(OsStr::to_str) {
                by_name.insert(name.to_owned(), parse(&path, &text)?);
            }
        }
        Ok(Self { by_name })
    }

    pub fn get(&self, name: &str) -> Option<&Profile> {
        self.by_name.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Returns the name of the profile of a program, by the program's file name.
    pub fn recognise(&self, program: &str) -> Option<&str> {
        let file_name = Path::new(program).file_name()?.to_str()?;
        let mut profiles = self.by_name.iter();
        profiles.find(|(_, profile)| profile.programs.iter().any(|p| p == file_name)).map(|(name, _)| name.as_str())
    }
}

fn parse(path: &Path, text: &str) -> Result<Profile, ProfileError> {
    toml::from_str(text).map_err(|source| ProfileError::Malformed { path: path.to_owned(), source: Box::new(source) })
}

/// The run whose session is to be found.
#[derive(Debug, Clone, Copy)]
pub struct RunOf<'a> {
    /// The agent's environment.
    pub env: &'a BTreeMap<String, String>,
    pub cwd: &'a str,
    /// When the agent was first started, in Unix milliseconds: older files belong to other sessions.
    pub since_ms: i64,
    /// The processes of the run while it is alive: a session file that one of them has open is the run's.
    pub pids: &'a [i32],
    /// The session that was found earlier.
    pub known: Option<&'a str>,
}

impl SessionFiles {
    /// Finds the session of a run: the file that its processes have open, else the one found earlier, else the newest
    /// one that names the run's working directory.
    pub fn find(&self, run: RunOf<'_>) -> Option<Session> {
        if let Some(open) = self.held_open(run) {
            return Some(open);
        }
        let directory = self.directory_of(run)?;
        let mut files = Vec::new();
        self.collect(&directory, &mut files);
        if let Some(known) = run.known
            && let Some((_, file)) = files.iter().find(|(_, file)| self.id_of(file).as_deref() == Some(known))
        {
            return self.at(&directory, file.clone());
        }
        files.retain(|(modified_ms, _)| *modified_ms >= run.since_ms);
        files.sort();
        let file = files.into_iter().rev().map(|(_, file)| file).find(|file| names_directory(file, run.cwd))?;
        self.at(&directory, file)
    }

    /// Finds the session whose file the run's processes have open. Reads only the descriptors of these processes,
    /// however many sessions there are.
    pub fn held_open(&self, run: RunOf<'_>) -> Option<Session> {
        let directory = self.directory_of(run)?;
        run.pids.iter().flat_map(|pid| open_files(*pid)).find_map(|file| self.at(&directory, file))
    }

    fn directory_of(&self, run: RunOf<'_>) -> Option<PathBuf> {
        // `/proc/PID/fd` has resolved paths.
        expand(&self.directory, run.env)?.canonicalize().ok()
    }

    fn at(&self, directory: &Path, file: PathBuf) -> Option<Session> {
        if !file.starts_with(directory) {
            return None;
        }
        Some(Session { id: self.id_of(&file)?, file })
    }

    fn id_of(&self, file: &Path) -> Option<String> {
        let name = file.file_name()?.to_str()?;
        let stem = name.strip_prefix(&self.prefix)?.strip_suffix(&self.suffix)?;
        match self.id_length {
            None => Some(stem.to_owned()),
            Some(length) => stem.get(stem.len().checked_sub(length)?..).map(str::to_owned),
        }
    }

    fn collect(&self, directory: &Path, files: &mut Vec<(i64, PathBuf)>) {
        let mut pending = vec![directory.to_owned()];
        let mut count = 0;
        while let Some(next) = pending.pop() {
            count += 1;
            if count > MAX_DIRECTORIES {
                tracing::warn!(directory = %directory.display(), "too many directories to search for sessions");
                return;
            }
            let Ok(entries) = std::fs::read_dir(&next) else { continue };
            for entry in entries.flatten() {
                let Ok(kind) = entry.file_type() else { continue };
                if kind.is_dir() {
                    pending.push(entry.path());
                } else if kind.is_file() && self.id_of(&entry.path()).is_some() {
                    files.push((modified_ms(&entry).unwrap_or(0), entry.path()));
                }
            }
        }
    }
}

fn modified_ms(entry: &std::fs::DirEntry) -> Option<i64> {
    let modified = entry.metadata().ok()?.modified().ok()?;
    let since = modified.duration_since(std::time::UNIX_EPOCH).ok()?;
    i64::try_from(since.as_millis()).ok()
}

/// Returns the regular files that a process has open.
fn open_files(pid: i32) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    // The metadata is that of the open file itself, so that FIFOs and devices are left out without opening them.
    let regular = entries.flatten().map(|entry| entry.path()).filter(|fd| fd.metadata().is_ok_and(|of| of.is_file()));
    regular.filter_map(|fd| std::fs::read_link(fd).ok()).filter(|path| path.is_absolute()).collect()
}

/// Opens a session file for reading; returns it and its size in bytes, or `None` if the path is not (any more) that of a
/// regular file. Never blocks, as the open of a FIFO or a device could.
///
/// # Errors
/// The file cannot be opened, or its metadata cannot be read.
pub fn open_session(file: &Path) -> io::Result<Option<(File, u64)>> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY;
    let open = match OpenOptions::new().read(true).custom_flags(flags).open(file) {
        Ok(open) => open,
        // A symbolic link, or a socket.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let meta = open.metadata()?;
    Ok(meta.is_file().then_some((open, meta.len())))
}

/// Returns whether the beginning of a session file contains the directory as a JSON string.
fn names_directory(file: &Path, directory: &str) -> bool {
    use std::io::Read as _;
    let Ok(Some((open, _))) = open_session(file) else { return false };
    let mut head = Vec::new();
    if open.take(HEAD_BYTES as u64).read_to_end(&mut head).is_err() {
        return false;
    }
    let Ok(wanted) = serde_json::to_string(directory) else { return false };
    head.windows(wanted.len()).any(|window| window == wanted.as_bytes())
}

/// Expands a leading `~`, `${VAR}` and `${VAR:-default}`.
fn expand(text: &str, env: &BTreeMap<String, String>) -> Option<PathBuf> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        out.push_str(&rest[..at]);
        let end = rest[at..].find('}')? + at;
        let inside = &rest[at + 2..end];
        let (name, default) = inside.split_once(":-").map_or((inside, None), |(n, d)| (n, Some(d)));
        match env.get(name).filter(|value| !value.is_empty()) {
            Some(value) => out.push_str(value),
            None => out.push_str(default?),
        }
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    match out.strip_prefix('~') {
        Some(below) => Some(PathBuf::from(env.get("HOME")?).join(below.trim_start_matches('/'))),
        None => Some(PathBuf::from(out)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn shipped_profiles_are_valid_and_recognised() {
        let profiles = Profiles::load(Path::new("/nonexistent")).expect("valid");
        assert_eq!(profiles.recognise("/usr/local/bin/codex"), Some("codex"));
        assert_eq!(profiles.recognise("claude"), Some("claude"));
        assert_eq!(profiles.recognise("bash"), None);
    }

    #[test]
    fn variables_and_the_home_are_expanded() {
        let home = env(&[("HOME", "/h")]);
        assert_eq!(expand("${CODEX_HOME:-~/.codex}/sessions", &home), Some("/h/.codex/sessions".into()));
        let set = env(&[("HOME", "/h"), ("CODEX_HOME", "/c")]);
        assert_eq!(expand("${CODEX_HOME:-~/.codex}/sessions", &set), Some("/c/sessions".into()));
        assert_eq!(expand("${NOTHING}/x", &home), None);
    }

    #[test]
    fn the_newest_session_of_the_working_directory_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let id = |n: u8| format!("0199b7a0-0000-7000-8000-00000000000{n}");
        for (n, cwd) in [(1, "/w/a"), (2, "/w/b"), (3, "/w/a2")] {
            let file = dir.path().join(format!("rollout-2026-{}.jsonl", id(n)));
            std::fs::write(file, format!("{{\"payload\":{{\"cwd\":\"{cwd}\"}}}}\n")).expect("written");
        }
        let files = SessionFiles {
            directory: dir.path().to_string_lossy().into_owned(),
            prefix: "rollout-".into(),
            suffix: ".jsonl".into(),
            id_length: Some(36),
        };
        let nothing = BTreeMap::new();
        let run = RunOf { env: &nothing, cwd: "/w/a", since_ms: 0, pids: &[], known: None };
        assert_eq!(files.find(run).map(|s| s.id), Some(id(1)));
        assert_eq!(files.find(RunOf { known: Some(&id(2)), ..run }).map(|s| s.id), Some(id(2)));
        assert_eq!(files.find(RunOf { since_ms: i64::MAX, ..run }), None);
        let own = std::process::id() as i32;
        let open = std::fs::File::open(dir.path().join(format!("rollout-2026-{}.jsonl", id(3)))).expect("opened");
        assert_eq!(files.find(RunOf { pids: &[own], ..run }).map(|s| s.id), Some(id(3)));
        drop(open);
    }

    #[test]
    fn a_fifo_with_the_name_of_a_session_is_none_and_is_not_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let fifo = dir.path().join("a.jsonl");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let both_ends = OpenOptions::new().read(true).write(true).open(&fifo).expect("opened");
        let files = SessionFiles {
            directory: dir.path().to_string_lossy().into_owned(),
            prefix: String::new(),
            suffix: ".jsonl".into(),
            id_length: None,
        };
        let own = [std::process::id() as i32];
        let nothing = BTreeMap::new();
        let run = RunOf { env: &nothing, cwd: "/w", since_ms: 0, pids: &own, known: Some("a") };
        assert_eq!(files.find(run), None);
        drop(both_ends);
        // Now the FIFO has no other end.
        assert!(open_session(&fifo).expect("examined").is_none());
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("b.jsonl")).expect("made");
        assert!(open_session(&dir.path().join("b.jsonl")).expect("examined").is_none());
        let file = dir.path().join("c.jsonl");
        std::fs::write(&file, "12345").expect("written");
        assert_eq!(open_session(&file).expect("opened").expect("a file").1, 5);
    }
}
