//! The stored form of an agent's state: the members `state` and `run` of its row.
//!
//! The run stands beside the state, and may be absent, because databases of earlier releases have it so. A row whose
//! state needs a run and has none is refused.

use fermata_protocol::UnixMillis;
use fermata_protocol::agent::StartCause;
use serde::{Deserialize, Serialize, Serializer};

use super::{AfterStop, AgentState, EndedBy, Run};
use crate::restart::RestartKind;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StateName {
    Waiting(StartCause),
    Backoff { until: UnixMillis, again: RestartKind, cause: StartCause, detail: String },
    Starting,
    Running,
    Held(PausedAs),
    Stopping(AfterStop),
    Ended(EndedBy),
    Failed { detail: Option<String> },
    TimedOut,
    Interrupted { detail: String },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PausedAs {
    Frozen,
    Parked,
}

/// What is read from a row.
#[derive(Deserialize)]
pub(super) struct StoredAgentState {
    state: StateName,
    run: Option<Run>,
}

/// What is written to a row.
#[derive(Serialize)]
struct WrittenAgentState<'a> {
    state: StateName,
    run: Option<&'a Run>,
}

impl Serialize for AgentState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let state = match self {
            Self::Waiting { cause, .. } => StateName::Waiting(*cause),
            Self::Backoff { until, restart, cause, detail, .. } => {
                StateName::Backoff { until: *until, again: *restart, cause: *cause, detail: detail.clone() }
            }
            Self::Starting(_) => StateName::Starting,
            Self::Running(_) => StateName::Running,
            Self::Frozen(_) => StateName::Held(PausedAs::Frozen),
            Self::Parked(_) => StateName::Held(PausedAs::Parked),
            Self::Stopping { then, .. } => StateName::Stopping(*then),
            Self::Ended { by, .. } => StateName::Ended(*by),
            Self::Failed { detail, .. } => StateName::Failed { detail: detail.clone() },
            Self::TimedOut { .. } => StateName::TimedOut,
            Self::Interrupted { detail, .. } => StateName::Interrupted { detail: detail.clone() },
        };
        WrittenAgentState { state, run: self.run() }.serialize(serializer)
    }
}

impl TryFrom<StoredAgentState> for AgentState {
    type Error = &'static str;

    fn try_from(StoredAgentState { state, run: last }: StoredAgentState) -> Result<Self, Self::Error> {
        let current = |last: Option<Run>| last.ok_or("the agent's state needs a run, and its row has none");
        Ok(match state {
            StateName::Waiting(cause) => Self::Waiting { cause, last },
            StateName::Backoff { until, again, cause, detail } => {
                Self::Backoff { until, restart: again, cause, detail, last }
            }
            StateName::Starting => Self::Starting(current(last)?),
            StateName::Running => Self::Running(current(last)?),
            StateName::Held(PausedAs::Frozen) => Self::Frozen(current(last)?),
            StateName::Held(PausedAs::Parked) => Self::Parked(current(last)?),
            StateName::Stopping(then) => Self::Stopping { run: current(last)?, then },
            StateName::Ended(by) => Self::Ended { by, last },
            StateName::Failed { detail } => Self::Failed { detail, last },
            StateName::TimedOut => Self::TimedOut { last },
            StateName::Interrupted { detail } => Self::Interrupted { detail, last },
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::agent::Agent;

    fn row(state: &Value, run: &Value) -> Value {
        json!({
            "name": "a",
            "spec": { "argv": ["x"], "cwd": "/w", "umask": 18, "limits": {}, "stop_grace_ms": 10 },
            "state": state,
            "runs": 1,
            "row": { "starts": 2, "since": 7 },
            "run": run,
            "created_at": 1,
            "progress": { "percent": 1.5, "reported_at": 3 },
            "session": null,
            "usage": { "input_tokens": 1, "output_tokens": 2, "cost_micro_usd": 3 },
        })
    }

    fn run() -> Value {
        json!({
            "id": "run-1", "argv": ["x"], "token_sha256": "", "started_at": 2, "ended": null, "cause": "policy",
            "processes": {
                "pid": 10, "start_ticks": 1, "shim_pid": 9, "shim_start_ticks": 1, "boot_id": "b", "mechanism": "cgroup",
            },
            "clock": { "counted_ms": 5, "since": 6 }, "carried_ms": 0, "silence": null, "reported_ms": null,
            "ready_at": null, "stale_at": null, "ending": "time_up",
        })
    }

    /// The rows are those of the release before the run was part of the state.
    #[test]
    fn rows_of_earlier_releases_are_read_and_written_as_they_were() {
        for state in [
            json!({ "waiting": "run" }),
            json!({ "backoff": { "until": 9, "again": "goes_on", "cause": "policy", "detail": "exit code 1" } }),
            json!("starting"),
            json!("running"),
            json!({ "held": "frozen" }),
            json!({ "held": "parked" }),
            json!({ "stopping": "not_ready" }),
            json!({ "ended": "by_itself" }),
            json!({ "ended": "stopped" }),
            json!({ "failed": { "detail": null } }),
            json!("timed_out"),
            json!({ "interrupted": { "detail": "lost" } }),
        ] {
            let stored = row(&state, &run());
            let agent: Agent = serde_json::from_value(stored.clone()).unwrap_or_else(|e| panic!("{e}: {state}"));
            assert_eq!(agent.run().map(|run| run.id.as_str()), Some("run-1"));
            assert_eq!(serde_json::to_value(&agent).expect("serialises"), stored);
        }
    }

    #[test]
    fn only_a_state_without_a_current_run_is_read_without_one() {
        let read = |state| serde_json::from_value::<Agent>(row(&state, &Value::Null));
        let waiting = read(json!({ "waiting": "run" })).expect("it has never run");
        assert!(waiting.run().is_none());
        let error = read(json!("running")).expect_err("a running agent has a run").to_string();
        assert!(error.contains("needs a run"), "{error}");
    }
}
