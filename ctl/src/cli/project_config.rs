//! When checkpoints are made by themselves, as options of `project create` and `project set`.

use std::time::Duration;

use clap::Args;
use fermata_protocol::project::AutomaticCheckpoints;

use crate::units::{millis, parse_duration};

/// When checkpoints are made by themselves; see [`fermata_protocol::project::AutomaticCheckpoints`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Automatic checkpoints (while agents run, where something has changed)")]
pub struct AutomaticArgs {
    /// One after the agents have run for so long since the last, for instance 2m; 0s for never.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub checkpoint_every: Option<Duration>,
    /// One after so many units of progress since the last; 0 for never.
    #[arg(long, value_name = "N")]
    pub checkpoint_units: Option<u64>,
    /// One when the phase of the work has changed.
    #[arg(long, value_name = "BOOL")]
    pub checkpoint_on_phase: Option<bool>,
    /// One before the daemon ends and leaves the agents running.
    #[arg(long, value_name = "BOOL")]
    pub checkpoint_at_shutdown: Option<bool>,
}

impl AutomaticArgs {
    /// Says whether nothing was given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Lays what was given over settings.
    pub fn over(&self, before: AutomaticCheckpoints) -> AutomaticCheckpoints {
        AutomaticCheckpoints {
            every_units: self.checkpoint_units.unwrap_or(before.every_units),
            every_ms: self.checkpoint_every.map_or(before.every_ms, millis),
            on_phase_change: self.checkpoint_on_phase.unwrap_or(before.on_phase_change),
            before_shutdown: self.checkpoint_at_shutdown.unwrap_or(before.before_shutdown),
        }
    }
}
