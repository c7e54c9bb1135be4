//! Handler of `agent.logs`: reads the log from a cursor, and waits for new lines at its end.

use std::borrow::Cow;
use std::path::PathBuf;
use std::time::Duration;

use fermata_core::redact::Secrets;
use fermata_protocol::agent::{AgentLogs, AgentLogsResult, LogLine};
use fermata_protocol::{AgentName, Code, Refusal, RunId, Target};
use serde_json::Value;
use tokio::time::Instant;

use super::reply::wire;
use super::reports::secrets;
use crate::errors::Failure;
use crate::operations::blocking;
use crate::project::{ProjectHandle, Projects};
use fermata_shim::log_line::Stream;
use fermata_shim::log_reader::{Batch, LogPosition, Start, read_once};
use fermata_shim::spec::files;

/// How much of the log one reply contains, in bytes.
const BATCH_BYTES: usize = 256 << 10;

/// The interval at which a waiting call reads the log.
const PACE: Duration = Duration::from_millis(50);

/// The longest wait of one call.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The position of a reader: a run, and a place in its files; none for their beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LogCursor {
    run: RunId,
    position: Option<LogPosition>,
}

impl LogCursor {
    fn to_text(&self) -> String {
        match self.position {
            Some(at) => format!("{}:{}:{}:{}", self.run, at.number, at.inode, at.offset),
            None => self.run.to_string(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let run = RunId::new(parts.next()?).ok()?;
        let numbers: Vec<u64> = parts.map(str::parse).collect::<Result<_, _>>().ok()?;
        let position = match numbers[..] {
            [] => None,
            [number, inode, offset] => Some(LogPosition { number, inode, offset }),
            _ => return None,
        };
        Some(Self { run, position })
    }
}

pub(super) async fn read(projects: &Projects, params: &AgentLogs) -> Result<Value, Failure> {
    let handle = projects.get(&params.target.project)?;
    let name = params.target.agent.as_ref().ok_or_else(|| {
        Refusal::new(Code::InvalidParams, format!("'{}' is a project, not one of its agents", params.target))
    })?;
    let secrets = secrets(projects, &handle, name).await?;
    let deadline = Instant::now() + Duration::from_millis(params.wait_ms).min(MAX_WAIT);
    let (mut cursor, mut start) = match &params.cursor {
        Some(text) => {
            let cursor = LogCursor::parse(text).ok_or_else(|| {
                Refusal::new(Code::InvalidParams, "'cursor' is not a cursor of agent.logs".to_owned())
            })?;
            let start = cursor.position.map_or(Start::Begin, Start::At);
            (cursor, start)
        }
        None => {
            let run = chosen_run(&handle, params, name)?;
            let start = match (params.tail, params.since) {
                (Some(lines), since) => Start::FromEnd {
                    lines: usize::try_from(lines).unwrap_or(usize::MAX),
                    since_ms: since.map(|since| since.0),
                },
                (None, Some(since)) => Start::Since(since.0),
                (None, None) => Start::Begin,
            };
            (LogCursor { run, position: None }, start)
        }
    };
    loop {
        // Determined before the log is read, so that the read sees everything that an ended run has written.
        let over = is_over(&handle, name, &cursor.run);
        let dir = handle.step_context().dirs().run(name, &cursor.run).join(files::LOGS);
        let (lines, position) = batch(dir, start).await?;
        cursor.position = position.or(cursor.position);
        start = cursor.position.map_or(start, Start::At);
        let mut end = false;
        if lines.is_empty() && over {
            let newest = current_run(&handle, &params.target, name)?;
            let one_run = params.run.is_some() || params.runs_back > 0;
            if newest == cursor.run || one_run {
                end = true;
            } else {
                // The agent was started again: the output of its newest run follows.
                cursor = LogCursor { run: newest, position: None };
                start = Start::Begin;
                continue;
            }
        }
        if !lines.is_empty() || end || Instant::now() >= deadline {
            let lines = if params.raw { lines } else { redacted(lines, &secrets) };
            return wire(&AgentLogsResult { lines, cursor: cursor.to_text(), end });
        }
        tokio::time::sleep(PACE).await;
    }
}

fn redacted(mut lines: Vec<LogLine>, secrets: &Secrets) -> Vec<LogLine> {
    for line in &mut lines {
        if let Cow::Owned(text) = secrets.redact(&line.text) {
            line.text = text;
        }
    }
    lines
}

/// Returns the run whose log was requested.
fn chosen_run(handle: &ProjectHandle, params: &AgentLogs, name: &AgentName) -> Result<RunId, Failure> {
    let current = current_run(handle, &params.target, name)?;
    if params.run.is_none() && params.runs_back == 0 {
        return Ok(current);
    }
    let dir = handle.step_context().dirs().runs(name);
    let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
    let mut kept: Vec<RunId> = entries
        .filter_map(|entry| RunId::new(entry.file_name().to_str()?).ok())
        .filter(|run| *run <= current)
        .collect();
    // Ids begin with the time.
    kept.sort_unstable();
    let chosen = match &params.run {
        Some(wanted) => kept.iter().find(|run| *run == wanted),
        None => kept.iter().rev().nth(usize::try_from(params.runs_back).unwrap_or(usize::MAX)),
    };
    chosen.cloned().ok_or_else(|| {
        let ids: Vec<String> = kept.iter().map(ToString::to_string).collect();
        let message = match &params.run {
            Some(run) => format!("agent {} has no log of a run '{run}'", params.target),
            None => format!("agent {} has no log of a run that far back", params.target),
        };
        let refusal = Refusal::new(Code::LogNotFound, message);
        if ids.is_empty() { refusal } else { refusal.hint(format!("runs with a log: {}", ids.join(", "))) }.into()
    })
}

fn current_run(handle: &ProjectHandle, target: &Target, name: &AgentName) -> Result<RunId, Failure> {
    let project = handle.project();
    let agent = project.agents.get(name).ok_or_else(|| {
        Failure::from(
            Refusal::new(Code::AgentNotFound, format!("there is no agent {target}"))
                .hint(format!("fermatactl ps {}", target.project)),
        )
    })?;
    let run = agent.run().map(|run| run.id.clone());
    run.ok_or_else(|| Refusal::new(Code::AgentNotRunning, format!("agent {target} has never run")).into())
}

/// Returns whether nothing more will be written to the log of a run.
fn is_over(handle: &ProjectHandle, name: &AgentName, run: &RunId) -> bool {
    let project = handle.project();
    project.agents.get(name).is_none_or(|agent| match agent.run() {
        Some(current) if current.id == *run => agent.is_terminal(),
        Some(_) | None => true,
    })
}

async fn batch(dir: PathBuf, start: Start) -> Result<(Vec<LogLine>, Option<LogPosition>), Failure> {
    blocking("read the log", move || {
        let Batch { lines, position, skipped } = read_once(&dir, start, BATCH_BYTES)
            .map_err(|error| Failure::fault(&format!("read {}", dir.display()), &error))?;
        let mut shown: Vec<LogLine> = lines
            .into_iter()
            .map(|line| LogLine {
                at_ns: line.at_ns,
                stream: line.stream.word().to_owned(),
                text: String::from_utf8_lossy(&line.bytes).into_owned(),
                partial: line.partial,
            })
            .collect();
        if skipped > 0 {
            let at_ns = shown.last().map_or(0, |line| line.at_ns);
            let text = format!("{skipped} damaged lines of the log were skipped");
            shown.push(LogLine { at_ns, stream: Stream::Gap.word().to_owned(), text, partial: false });
        }
        Ok((shown, position))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_round_trip_and_other_texts_are_refused() {
        let run = RunId::new("run-0a1b").expect("valid");
        for position in [None, Some(LogPosition { number: 3, inode: 9, offset: 12 })] {
            let cursor = LogCursor { run: run.clone(), position };
            assert_eq!(LogCursor::parse(&cursor.to_text()), Some(cursor));
        }
        for bad in ["", "x", "run-0a1b:1:2", "run-0a1b:1:2:x", "run-0a1b:1:2:3:4"] {
            assert_eq!(LogCursor::parse(bad), None, "{bad}");
        }
    }
}
