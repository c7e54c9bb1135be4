//! Writes the context snapshot of a checkpoint: what its agents know, for those who go on.
//!
//! It is written as it comes, and hashed while it is written: ten thousand items are in memory a few
//! at a time. What is known last (number, time, phase) is at the end, so that all the rest can be
//! written before.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use fermata_protocol::context::ContextItem;
use fermata_protocol::task::Phase;
use fermata_protocol::{AgentName, CheckpointNumber, ProjectName, UnixMillis};
use serde_json::json;

use crate::hashing::HashingWriter;
use crate::operations::checkpoint::layout::FORMAT;
use crate::store::pinned::States;

/// How much is hashed and handed to the kernel at once, bytes.
const BLOCK: usize = 256 << 10;

/// What is sent to the writer.
pub enum Piece {
    /// The agents' blobs; first.
    States(States),
    /// Some of the items, by agent and then oldest first.
    Items(Vec<ContextItem>),
}

/// A context snapshot whose agents are written and whose end is not.
pub struct ContextFile {
    out: BufWriter<HashingWriter<File>>,
    path: PathBuf,
    /// Tokens of the items in it.
    pub tokens: u64,
}

impl ContextFile {
    /// Writes agents and items as they come in; those of agents that are not named, and those in
    /// `archived`, are left out.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(
        path: &Path,
        agents: &[AgentName],
        archived: &HashSet<i64>,
        pieces: &Receiver<Piece>,
    ) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let hashed = HashingWriter::new(file);
        let mut made = Self { out: BufWriter::with_capacity(BLOCK, hashed), path: path.to_owned(), tokens: 0 };
        made.out.write_all(br#"{"agents":{"#)?;
        let mut states = States::new();
        let mut to_come = agents.iter();
        // The agent whose items are being written, and how many there are so far.
        let mut open: Option<(&AgentName, u64)> = None;
        for piece in pieces {
            let items = match piece {
                Piece::States(found) => {
                    states = found;
                    continue;
                }
                Piece::Items(items) => items,
            };
            for item in items {
                while open.is_none_or(|(agent, _)| *agent < item.agent) {
                    let Some(next) = to_come.next() else { break };
                    made.begin_agent(next, open.is_none(), &states)?;
                    open = Some((next, 0));
                }
                let Some((agent, count)) = &mut open else { continue };
                if **agent != item.agent || archived.contains(&item.id) {
                    continue;
                }
                if *count > 0 {
                    made.out.write_all(b",")?;
                }
                *count += 1;
                made.tokens += item.tokens;
                serde_json::to_writer(&mut made.out, &item)?;
            }
        }
        for agent in to_come {
            made.begin_agent(agent, open.is_none(), &states)?;
            open = Some((agent, 0));
        }
        made.out.write_all(if open.is_some() { b"]}}" } else { b"}" })?;
        Ok(made)
    }

    /// Ends the agent before, and begins one.
    fn begin_agent(&mut self, agent: &AgentName, first: bool, states: &States) -> io::Result<()> {
        if !first {
            self.out.write_all(b"]},")?;
        }
        serde_json::to_writer(&mut self.out, agent)?;
        // The blob is JSON as it is stored.
        let state = states.iter().find(|(name, _)| name == agent).map_or("null", |(_, state)| state.as_str());
        write!(self.out, r#":{{"state":{state},"items":["#)
    }

    /// Hands what was written to the disk, and waits until it is there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn sync(&mut self) -> io::Result<()> {
        self.out.flush()?;
        self.out.get_ref().get_ref().sync_all()
    }

    /// Writes the end; returns the file, which is yet to be synced, its size and SHA-256.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(
        mut self,
        project: &ProjectName,
        checkpoint: CheckpointNumber,
        created_at: UnixMillis,
        phase: Phase,
    ) -> io::Result<(File, u64, String)> {
        let end = json!({
            "format": FORMAT,
            "project": project,
            "checkpoint": checkpoint,
            "created_at": created_at,
            "phase": phase,
        });
        let end = end.to_string();
        self.out.write_all(b",")?;
        self.out.write_all(&end.as_bytes()[1..])?;
        let hashed = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(hashed.into_parts())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_protocol::context::{ItemType, Tier};
    use serde_json::Value;
    use sha2::{Digest as _, Sha256};

    use crate::hashing::hex;

    fn name(text: &str) -> AgentName {
        AgentName::new(text).expect("valid")
    }

    fn item(id: i64, agent: &str) -> ContextItem {
        ContextItem {
            id,
            agent: name(agent),
            kind: ItemType::Code,
            tokens: 10,
            score: 0.5,
            tier: Tier::Warm,
            pinned: false,
            archived: false,
            access_count: 0,
            created_at: UnixMillis(1),
            text: format!("\"{id}\"\n"),
        }
    }

    fn written(agents: &[&str], items: Vec<ContextItem>, states: States) -> (Value, u64) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("context.json");
        let (sender, pieces) = std::sync::mpsc::channel();
        sender.send(Piece::States(states)).expect("sent");
        for item in items {
            sender.send(Piece::Items(vec![item])).expect("sent");
        }
        drop(sender);
        let agents: Vec<AgentName> = agents.iter().map(|agent| name(agent)).collect();
        let file = ContextFile::write(&path, &agents, &[3].into(), &pieces).expect("written");
        let tokens = file.tokens;
        let project = ProjectName::new("p").expect("valid");
        let (_, bytes, hash) = file.finish(&project, 7, UnixMillis(5), Phase::Review).expect("finished");
        let text = std::fs::read(&path).expect("there");
        assert_eq!((text.len() as u64, hex(&Sha256::digest(&text))), (bytes, hash));
        (serde_json::from_slice(&text).expect("JSON"), tokens)
    }

    #[test]
    fn every_agent_is_there_with_what_it_knows_and_nobody_else() {
        let items = vec![item(1, "a"), item(2, "c"), item(3, "c"), item(4, "c"), item(5, "gone"), item(6, "z")];
        let states = vec![(name("b"), r#"{"step":3}"#.to_owned())];
        let (value, tokens) = written(&["a", "b", "c", "d", "z"], items, states);
        assert_eq!(tokens, 40);
        assert_eq!((&value["checkpoint"], &value["phase"], &value["format"]), (&json!(7), &json!("review"), &json!(1)));
        let ids = |agent: &str| -> Vec<i64> {
            let items = value["agents"][agent]["items"].as_array().expect("a list");
            items.iter().filter_map(|item| item["id"].as_i64()).collect()
        };
        assert_eq!((ids("a"), ids("b"), ids("c"), ids("d"), ids("z")), (vec![1], vec![], vec![2, 4], vec![], vec![6]));
        assert_eq!(value["agents"]["b"]["state"]["step"], 3);
        assert_eq!(value["agents"]["a"]["state"], Value::Null);
        assert_eq!(value["agents"]["c"]["items"][0]["text"], "\"2\"\n");
        assert_eq!(value["agents"].as_object().map(serde_json::Map::len), Some(5));
    }

    #[test]
    fn a_project_without_agents_has_an_empty_one() {
        let (value, _) = written(&[], vec![item(1, "gone")], States::new());
        assert_eq!(value["agents"], json!({}));
    }
}
