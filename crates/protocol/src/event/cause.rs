//! Why runs of agents begin and end.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a run of an agent began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartCause {
    /// `agent.run`.
    Run,
    /// `agent.restart`.
    Restart,
    /// A resume of the project, or of the agent.
    Resume,
    /// Its restart policy.
    Policy,
    /// It was interrupted.
    Recovery,
}

/// Why an agent is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopCause {
    /// A person wants it.
    #[default]
    Asked,
    /// Its time is over.
    TimeUp,
    /// It has not reported for too long.
    Stale,
    /// It was not ready in time.
    NotReady,
}

impl StopCause {
    /// Says whether it is the usual cause, which stored events leave out.
    pub fn is_asked(&self) -> bool {
        *self == Self::Asked
    }
}
