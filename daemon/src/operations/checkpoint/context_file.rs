//! Writes the context snapshot of a checkpoint: the context items and state of each agent, for the agents that continue
//! from it.
//!
//! The items are written and hashed as they arrive, so that only a few of them are in memory at a time. The fields that
//! are known last (number, time, phase) are at the end, so that all others can be written before.

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

/// The bytes that are hashed and written at once.
const BLOCK: usize = 256 << 10;

/// Input of the writer.
pub enum ContextPiece {
    /// The agents' states, as JSON; sent first.
    States(States),
    /// Some of the items, ordered by agent and then oldest first.
    Items(Vec<ContextItem>),
}

/// A context snapshot that lacks only the fields at its end.
pub struct ContextFile {
    out: BufWriter<HashingWriter<File>>,
    path: PathBuf,
    /// The sum over the items in it.
    pub tokens: u64,
}

impl ContextFile {
    /// Writes agents and items as they arrive, without items of other agents than `agents` and those in `archived`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(
        path: &Path,
        agents: &[AgentName],
        archived: &HashSet<i64>,
        pieces: &Receiver<ContextPiece>,
    ) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let hashed = HashingWriter::new(file);
        let mut file = Self { out: BufWriter::with_capacity(BLOCK, hashed), path: path.to_owned(), tokens: 0 };
        file.out.write_all(br#"{"agents":{"#)?;
        let mut states = States::new();
        let mut remaining_agents = agents.iter();
        // The agent whose items are being written, and how many were written.
        let mut open: Option<(&AgentName, u64)> = None;
        for piece in pieces {
            let items = match piece {
                ContextPiece::States(received) => {
                    states = received;
                    continue;
                }
                ContextPiece::Items(items) => items,
            };
            for item in items {
                while open.is_none_or(|(agent, _)| *agent < item.agent) {
                    let Some(next) = remaining_agents.next() else { break };
                    file.begin_agent(next, open.is_none(), &states)?;
                    open = Some((next, 0));
                }
                let Some((agent, count)) = &mut open else { continue };
                if **agent != item.agent || archived.contains(&item.id) {
                    continue;
                }
                if *count > 0 {
                    file.out.write_all(b",")?;
                }
                *count += 1;
                file.tokens += item.tokens;
                serde_json::to_writer(&mut file.out, &item)?;
            }
        }
        for agent in remaining_agents {
            file.begin_agent(agent, open.is_none(), &states)?;
            open = Some((agent, 0));
        }
        file.out.write_all(if open.is_some() { b"]}}" } else { b"}" })?;
        Ok(file)
    }

    /// Ends the previous agent, if any, and begins the next one.
    fn begin_agent(&mut self, agent: &AgentName, first: bool, states: &States) -> io::Result<()> {
        if !first {
            self.out.write_all(b"]},")?;
        }
        serde_json::to_writer(&mut self.out, agent)?;
        // The stored state is JSON already.
        let state = states.iter().find(|(name, _)| name == agent).map_or("null", |(_, state)| state.as_str());
        write!(self.out, r#":{{"state":{state},"items":["#)
    }

    /// Makes the bytes that were written so far durable.
    ///
    /// # Errors
    /// When they cannot be written or synced.
    pub fn sync(&mut self) -> io::Result<()> {
        self.out.flush()?;
        self.out.get_ref().get_ref().sync_all()
    }

    /// Writes the fields at the end; returns the file, which is not synced yet, its size and SHA-256.
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

    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_protocol::context::{ItemType, Tier};
    use serde_json::Value;

    use crate::hashing::sha256;

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
        sender.send(ContextPiece::States(states)).expect("the receiver exists");
        for item in items {
            sender.send(ContextPiece::Items(vec![item])).expect("the receiver exists");
        }
        drop(sender);
        let agents: Vec<AgentName> = agents.iter().map(|agent| name(agent)).collect();
        let file = ContextFile::write(&path, &agents, &[3].into(), &pieces).expect("written");
        let tokens = file.tokens;
        let project = ProjectName::new("p").expect("valid");
        let (_, bytes, hash) = file.finish(&project, 7, UnixMillis(5), Phase::Review).expect("finished");
        let text = std::fs::read(&path).expect("readable");
        assert_eq!((text.len() as u64, sha256(&text)), (bytes, hash));
        (serde_json::from_slice(&text).expect("JSON"), tokens)
    }

    #[test]
    fn the_file_has_every_agent_with_its_items_and_state_and_no_other_agent() {
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
    fn the_file_of_a_project_without_agents_has_an_empty_object() {
        let (value, _) = written(&[], vec![item(1, "gone")], States::new());
        assert_eq!(value["agents"], json!({}));
    }
}
