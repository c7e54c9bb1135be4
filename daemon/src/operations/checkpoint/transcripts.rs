//! Copies the tools' transcripts into a checkpoint, since vendors delete old ones.
//!
//! ```text
//! find    find the sessions                            before the freeze
//! open    open each file and note its size             under the freeze
//! copy    copy that many bytes, hash them, sync        after the thaw; for a pause, before its commit
//! ```
//! Tools append to their transcripts: the first bytes of the open file, up to the noted size, are its content at that
//! instant. Must not wait for anything that an agent could delay.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use fermata_protocol::AgentName;
use fermata_protocol::checkpoint::{ManifestPart, PartKind};

use crate::errors::Failure;
use crate::hashing::HashingWriter;
use crate::operations::directory;
use crate::operations::run::session::{self, FoundSessions};
use crate::operations::{StepContext, blocking};
use crate::profile::{self, Session};

/// The directory of the transcripts in a checkpoint's directory.
const DIRECTORY: &str = "transcripts";

/// The bytes that are copied at once.
const BUFFER: usize = 128 << 10;

/// An open transcript with its size at the instant of the freeze.
struct Transcript {
    /// The path of the copy in the checkpoint's directory.
    relative: PathBuf,
    /// The path of the original, for messages.
    source: PathBuf,
    file: File,
    bytes: u64,
}

/// The sessions of the agents and their transcripts, opened.
#[derive(Default)]
pub(super) struct OpenedTranscripts {
    pub sessions: Vec<(AgentName, Session)>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    transcripts: Vec<Transcript>,
}

/// Finds the sessions of all agents.
///
/// # Errors
/// When the store cannot be read.
pub async fn find(step: &StepContext) -> Result<FoundSessions, Failure> {
    let agents: Vec<AgentName> = step.project.agents.keys().cloned().collect();
    session::find(step, &agents).await
}

/// Opens the transcripts of these sessions, or of all that are found now. Leaves out a transcript that was removed or is
/// no regular file.
///
/// # Errors
/// When a transcript cannot be opened.
pub(super) async fn open(step: &StepContext, sessions: Option<FoundSessions>) -> Result<OpenedTranscripts, Failure> {
    let found = match sessions {
        Some(found) => found,
        None => find(step).await?,
    };
    if found.is_empty() {
        return Ok(OpenedTranscripts::default());
    }
    blocking("open transcripts", move || {
        let mut opened = OpenedTranscripts { sessions: found.current(), ..OpenedTranscripts::default() };
        for (agent, session) in &opened.sessions {
            let Some(relative) = path(agent, session) else { continue };
            let source = session.file.clone();
            match profile::open_session(&source) {
                Ok(Some((file, bytes))) => opened.transcripts.push(Transcript { relative, source, file, bytes }),
                Ok(None) => opened.warnings.push(format!(
                    "the transcript of agent '{agent}' is left out: {} is not a regular file",
                    source.display()
                )),
                // Its tool has just removed it: the checkpoint is made without it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::io("open", &source)(error)),
            }
        }
        Ok(opened)
    })
    .await
}

/// The transcripts in a checkpoint's directory, durable.
pub(super) struct CopiedTranscripts {
    pub sessions: Vec<(AgentName, Session)>,
    pub parts: Vec<ManifestPart>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// Copies opened transcripts into a checkpoint's directory and makes them durable.
///
/// # Errors
/// When a transcript cannot be read or its copy cannot be written.
pub(super) async fn copy(opened: OpenedTranscripts, partial: &Path) -> Result<CopiedTranscripts, Failure> {
    let OpenedTranscripts { sessions, warnings, transcripts } = opened;
    if transcripts.is_empty() {
        return Ok(CopiedTranscripts { sessions, parts: Vec::new(), warnings });
    }
    let partial = partial.to_owned();
    blocking("copy transcripts", move || {
        let mut copied = CopiedTranscripts { sessions, parts: Vec::new(), warnings };
        let mut directories = BTreeSet::new();
        for transcript in transcripts {
            let expected = transcript.bytes;
            let source = transcript.source.clone();
            let part = copy_one(transcript, &partial, &mut directories).map_err(Failure::io("copy", &source))?;
            if part.bytes < expected {
                let (copied_bytes, source) = (part.bytes, source.display());
                copied.warnings.push(format!(
                    "{source} shrank while it was copied: the checkpoint has {copied_bytes} of {expected} bytes"
                ));
            }
            copied.parts.push(part);
        }
        // For the names in them; the checkpoint's own directory is synced before it is renamed.
        for directory in directories {
            let synced = File::open(&directory).and_then(|open| open.sync_all());
            synced.map_err(Failure::io("sync", &directory))?;
        }
        Ok(copied)
    })
    .await
}

fn copy_one(transcript: Transcript, partial: &Path, directories: &mut BTreeSet<PathBuf>) -> io::Result<ManifestPart> {
    let Transcript { relative, file, bytes, .. } = transcript;
    let to = partial.join(&relative);
    let parent = to.parent().unwrap_or(partial);
    directory::create(parent)?;
    directories.extend([parent.to_owned(), partial.join(DIRECTORY)]);
    let mut copy = HashingWriter::new(OpenOptions::new().write(true).create_new(true).mode(0o600).open(&to)?);
    io::copy(&mut BufReader::with_capacity(BUFFER, file.take(bytes)), &mut copy)?;
    let (copy, bytes, sha256) = copy.into_parts();
    copy.sync_all()?;
    let path = relative.to_string_lossy().into_owned();
    Ok(ManifestPart { kind: PartKind::Transcript, path, bytes, sha256 })
}

/// Returns the path of a transcript in a checkpoint's directory.
fn path(agent: &AgentName, session: &Session) -> Option<PathBuf> {
    Some(PathBuf::from(DIRECTORY).join(agent.as_str()).join(session.file.file_name()?))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;

    use super::*;

    fn opened(dir: &Path, content: &str) -> OpenedTranscripts {
        let source = dir.join("s.jsonl");
        fs::write(&source, content).expect("written");
        let (file, bytes) = profile::open_session(&source).expect("opened").expect("a regular file");
        let relative = PathBuf::from(DIRECTORY).join("a").join("s.jsonl");
        let transcripts = vec![Transcript { relative, source, file, bytes }];
        OpenedTranscripts { transcripts, ..OpenedTranscripts::default() }
    }

    #[tokio::test]
    async fn the_copy_has_nothing_that_is_appended_or_replaced_after_the_file_was_opened() {
        let dir = tempfile::tempdir().expect("a directory");
        let partial = dir.path().join("1.partial");
        let opened = opened(dir.path(), "before\n");
        let source = dir.path().join("s.jsonl");
        OpenOptions::new().append(true).open(&source).and_then(|mut f| f.write_all(b"after\n")).expect("appended");
        fs::remove_file(&source).expect("purged");
        let copied = copy(opened, &partial).await.expect("copied");
        let place = partial.join("transcripts/a/s.jsonl");
        assert_eq!(fs::read_to_string(&place).expect("readable"), "before\n");
        let (bytes, sha256) = crate::hashing::hash_file(&place).expect("hashed");
        assert_eq!((copied.parts[0].bytes, &copied.parts[0].sha256), (bytes, &sha256));
        assert_eq!(copied.warnings, [""; 0]);
    }

    #[tokio::test]
    async fn a_transcript_that_shrinks_is_copied_up_to_its_end_with_a_warning() {
        let dir = tempfile::tempdir().expect("a directory");
        let opened = opened(dir.path(), "a long one");
        fs::write(dir.path().join("s.jsonl"), "short").expect("rewritten");
        let copied = copy(opened, &dir.path().join("1.partial")).await.expect("copied");
        assert_eq!(copied.parts[0].bytes, 5);
        assert!(copied.warnings[0].contains("5 of 10 bytes"), "{:?}", copied.warnings);
    }
}
