//! Copies the tools' transcripts into a checkpoint; vendors purge theirs.
//!
//! ```text
//! scout   look for the sessions                        before anybody stands still
//! open    open each file and note its size             while the agents stand still, an instant
//! copy    copy so many bytes, hash them, flush         once they run again; for a pause, before its commit
//! ```
//! Tools append to their transcripts: so many bytes of the open file are what it was at that instant. Must not wait for
//! anything that an agent could keep from happening.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use fermata_protocol::AgentName;
use fermata_protocol::checkpoint::{ManifestPart, PartKind};
use sha2::{Digest as _, Sha256};

use crate::errors::Failure;
use crate::hashing::hex;
use crate::operations::run::session::{self, Scouted};
use crate::operations::{StepContext, blocking};
use crate::profile::{self, Session};

/// The directory of the transcripts inside a checkpoint's.
const DIRECTORY: &str = "transcripts";

const BUFFER: usize = 128 << 10;

/// A transcript as it was while the agents stood still.
struct Transcript {
    /// Where it goes, inside the checkpoint's directory.
    relative: PathBuf,
    /// Where it comes from, for messages.
    source: PathBuf,
    file: File,
    bytes: u64,
}

/// The sessions that were found and their transcripts, opened.
pub(super) struct Opened {
    /// The sessions, by agent.
    pub sessions: Vec<(AgentName, Session)>,
    /// What a person should know.
    pub warnings: Vec<String>,
    transcripts: Vec<Transcript>,
}

/// Finds the sessions of all agents.
///
/// # Errors
/// When the store cannot be read.
pub async fn scout(site: &StepContext) -> Result<Scouted, Failure> {
    let agents: Vec<AgentName> = site.project.agents.keys().cloned().collect();
    session::scout(site, &agents).await
}

/// Opens the transcripts of what was scouted, or of what is found now.
///
/// # Errors
/// When one of them cannot be opened; one that is gone, or is no file, is left out.
pub(super) async fn open(site: &StepContext, scouted: Option<Scouted>) -> Result<Opened, Failure> {
    let scouted = match scouted {
        Some(scouted) => scouted,
        None => scout(site).await?,
    };
    if scouted.is_empty() {
        return Ok(Opened { sessions: Vec::new(), warnings: Vec::new(), transcripts: Vec::new() });
    }
    blocking("open transcripts", move || {
        let mut opened = Opened { sessions: scouted.now(), warnings: Vec::new(), transcripts: Vec::new() };
        for (agent, session) in &opened.sessions {
            let Some(relative) = path(agent, session) else { continue };
            let source = session.file.clone();
            match profile::open_session(&source) {
                Ok(Some((file, bytes))) => opened.transcripts.push(Transcript { relative, source, file, bytes }),
                Ok(None) => opened.warnings.push(format!(
                    "the transcript of agent '{agent}' is left out: {} is not a regular file",
                    source.display()
                )),
                // A session that its tool has just removed is no reason to have no checkpoint.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::fault(&format!("open {}", source.display()), &error)),
            }
        }
        Ok(opened)
    })
    .await
}

/// The transcripts inside a checkpoint's directory, durable.
pub(super) struct Copied {
    /// The sessions, by agent.
    pub sessions: Vec<(AgentName, Session)>,
    /// The files.
    pub parts: Vec<ManifestPart>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Copies what was opened into a checkpoint's directory and makes it durable.
///
/// # Errors
/// When a transcript cannot be read or its copy not be written.
pub(super) async fn copy(opened: Opened, partial: &Path) -> Result<Copied, Failure> {
    let Opened { sessions, warnings, transcripts } = opened;
    if transcripts.is_empty() {
        return Ok(Copied { sessions, parts: Vec::new(), warnings });
    }
    let partial = partial.to_owned();
    blocking("copy transcripts", move || {
        let mut copied = Copied { sessions, parts: Vec::new(), warnings };
        let mut directories = BTreeSet::new();
        for one in transcripts {
            let wanted = one.bytes;
            let source = one.source.clone();
            let part = copy_one(one, &partial, &mut directories)
                .map_err(|error| Failure::fault(&format!("copy {}", source.display()), &error))?;
            if part.bytes < wanted {
                let (there, source) = (part.bytes, source.display());
                copied
                    .warnings
                    .push(format!("{source} shrank while it was copied: {there} of {wanted} bytes are kept"));
            }
            copied.parts.push(part);
        }
        // The names in them; the checkpoint's own directory is flushed before it gets its place.
        for directory in directories {
            let synced = File::open(&directory).and_then(|open| open.sync_all());
            synced.map_err(|e| Failure::fault(&format!("sync {}", directory.display()), &e))?;
        }
        Ok(copied)
    })
    .await
}

fn copy_one(one: Transcript, partial: &Path, directories: &mut BTreeSet<PathBuf>) -> io::Result<ManifestPart> {
    let to = partial.join(&one.relative);
    let directory = to.parent().unwrap_or(partial);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    directories.extend([directory.to_owned(), partial.join(DIRECTORY)]);
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&to)?;
    let mut source = one.file.take(one.bytes);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    let mut bytes = 0;
    loop {
        let n = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&buffer[..n]);
        copy.write_all(&buffer[..n])?;
        bytes += n as u64;
    }
    copy.sync_all()?;
    Ok(ManifestPart {
        kind: PartKind::Transcript,
        path: one.relative.to_string_lossy().into_owned(),
        bytes,
        sha256: hex(&hash.finalize()),
    })
}

/// Returns the file of a transcript inside a checkpoint's directory.
fn path(agent: &AgentName, session: &Session) -> Option<PathBuf> {
    Some(PathBuf::from(DIRECTORY).join(agent.as_str()).join(session.file.file_name()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(dir: &Path, content: &str) -> Opened {
        let source = dir.join("s.jsonl");
        fs::write(&source, content).expect("written");
        let (file, bytes) = profile::open_session(&source).expect("looked at").expect("a file");
        let relative = PathBuf::from(DIRECTORY).join("a").join("s.jsonl");
        let transcripts = vec![Transcript { relative, source, file, bytes }];
        Opened { sessions: Vec::new(), warnings: Vec::new(), transcripts }
    }

    #[tokio::test]
    async fn what_is_appended_or_replaced_after_the_instant_is_not_in_the_copy() {
        let dir = tempfile::tempdir().expect("a directory");
        let partial = dir.path().join("1.partial");
        let opened = opened(dir.path(), "before\n");
        let source = dir.path().join("s.jsonl");
        OpenOptions::new().append(true).open(&source).and_then(|mut f| f.write_all(b"after\n")).expect("appended");
        fs::remove_file(&source).expect("purged");
        let copied = copy(opened, &partial).await.expect("copied");
        let place = partial.join("transcripts/a/s.jsonl");
        assert_eq!(fs::read_to_string(&place).expect("there"), "before\n");
        let (bytes, sha256) = crate::hashing::hash_file(&place).expect("hashed");
        assert_eq!((copied.parts[0].bytes, &copied.parts[0].sha256), (bytes, &sha256));
        assert_eq!(copied.warnings, [""; 0]);
    }

    #[tokio::test]
    async fn a_transcript_that_shrinks_is_kept_as_far_as_it_goes_and_told_of() {
        let dir = tempfile::tempdir().expect("a directory");
        let opened = opened(dir.path(), "a long one");
        fs::write(dir.path().join("s.jsonl"), "short").expect("rewritten");
        let copied = copy(opened, &dir.path().join("1.partial")).await.expect("copied");
        assert_eq!(copied.parts[0].bytes, 5);
        assert!(copied.warnings[0].contains("5 of 10 bytes"), "{:?}", copied.warnings);
    }
}
