//! The settings of a project, as options of `project create` and `project set`.

use std::time::Duration;

use clap::Args;
use fermata_protocol::project::{AutomaticCheckpoints, ProjectConfig};
use fermata_protocol::retention::Retention;

use super::resources::BudgetArgs;
use crate::units::{millis, parse_bytes, parse_duration};

/// Which files checkpoints contain, context limits, budget, retention, automatic checkpoints.
#[derive(Debug, Args, Default)]
pub struct ConfigArgs {
    /// Include paths that match this pattern although an ignore rule excludes them; may be repeated.
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,
    /// Exclude paths that match this pattern; may be repeated.
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Whether to apply .gitignore files.
    #[arg(long, value_name = "BOOL")]
    pub use_gitignore: Option<bool>,
    /// Skip and report files larger than this, for example 512MiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub max_file_size: Option<u64>,
    /// The token limit per agent.
    #[arg(long, value_name = "N")]
    pub token_limit: Option<u64>,
    /// The percentage of the token limit at which a flash save archives cold items.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub flash_save_at: Option<u8>,
    #[command(flatten)]
    pub budget: BudgetArgs,
    #[command(flatten)]
    pub retention: RetentionArgs,
    #[command(flatten)]
    pub automatic: AutomaticArgs,
}

impl ConfigArgs {
    pub fn is_empty(&self) -> bool {
        self.include.is_empty()
            && self.exclude.is_empty()
            && self.use_gitignore.is_none()
            && self.max_file_size.is_none()
            && self.token_limit.is_none()
            && self.flash_save_at.is_none()
            && self.budget.is_empty()
            && self.retention.is_empty()
            && self.automatic.is_empty()
    }

    /// Applies the given options to a configuration; `None` when no option was given.
    pub fn apply(self, mut config: ProjectConfig) -> Option<ProjectConfig> {
        if self.is_empty() {
            return None;
        }
        // A single empty pattern clears the list.
        let list = |given: Vec<String>| given.into_iter().filter(|p| !p.is_empty()).collect();
        if !self.include.is_empty() {
            config.include = list(self.include);
        }
        if !self.exclude.is_empty() {
            config.exclude = list(self.exclude);
        }
        if let Some(use_gitignore) = self.use_gitignore {
            config.use_gitignore = use_gitignore;
        }
        if let Some(bytes) = self.max_file_size {
            config.max_file_bytes = bytes;
        }
        if let Some(tokens) = self.token_limit {
            config.token_limit = tokens;
        }
        if let Some(percent) = self.flash_save_at {
            config.flash_save_at_percent = percent;
        }
        config.budget = self.budget.apply(config.budget);
        config.retention = self.retention.apply(config.retention);
        config.automatic = self.automatic.apply(config.automatic);
        Some(config)
    }
}

/// Which checkpoints of a project are kept, where that differs from the daemon's settings.
#[derive(Debug, Args, Default, Clone, Copy)]
pub struct RetentionArgs {
    /// Keep the newest N manual checkpoints; 0 keeps all.
    #[arg(long, value_name = "N")]
    pub keep_manual: Option<u64>,
    /// Keep the newest N checkpoints made by pauses; 0 keeps all.
    #[arg(long, value_name = "N")]
    pub keep_pause: Option<u64>,
    /// Keep the newest N checkpoints made before timeouts and shutdowns; 0 keeps all.
    #[arg(long, value_name = "N")]
    pub keep_ends: Option<u64>,
    /// Keep safety checkpoints of restores for this long, for example 7d; 0s keeps them forever.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub keep_safety: Option<Duration>,
    /// Limit the disk space of the project's checkpoints, for example 5G; 0 means no limit.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub max_checkpoint_bytes: Option<u64>,
}

impl RetentionArgs {
    pub fn is_empty(&self) -> bool {
        self.apply(Retention::default()).is_unset()
    }

    /// Replaces the settings that were given.
    #[must_use]
    pub fn apply(self, before: Retention) -> Retention {
        Retention {
            keep_manual: self.keep_manual.or(before.keep_manual),
            keep_pause: self.keep_pause.or(before.keep_pause),
            keep_ends: self.keep_ends.or(before.keep_ends),
            keep_safety_ms: self.keep_safety.map(millis).or(before.keep_safety_ms),
            max_bytes: self.max_checkpoint_bytes.or(before.max_bytes),
            ..before
        }
    }
}

/// When the daemon creates checkpoints by itself; see [`AutomaticCheckpoints`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Automatic checkpoints (while agents run; skipped when nothing has changed)")]
pub struct AutomaticArgs {
    /// After this much run time of the agents, for example 2m; 0s disables it.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub checkpoint_every: Option<Duration>,
    /// After N units of progress; 0 disables it.
    #[arg(long, value_name = "N")]
    pub checkpoint_units: Option<u64>,
    /// When the phase of the project changes.
    #[arg(long, value_name = "BOOL")]
    pub checkpoint_on_phase: Option<bool>,
    /// When the daemon shuts down and leaves the agents running.
    #[arg(long, value_name = "BOOL")]
    pub checkpoint_at_shutdown: Option<bool>,
}

impl AutomaticArgs {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Replaces the settings that were given.
    pub fn apply(&self, before: AutomaticCheckpoints) -> AutomaticCheckpoints {
        AutomaticCheckpoints {
            every_units: self.checkpoint_units.unwrap_or(before.every_units),
            every_ms: self.checkpoint_every.map_or(before.every_ms, millis),
            on_phase_change: self.checkpoint_on_phase.unwrap_or(before.on_phase_change),
            before_shutdown: self.checkpoint_at_shutdown.unwrap_or(before.before_shutdown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_are_not_given_stay() {
        let before = ProjectConfig { exclude: vec!["target/".into()], token_limit: 7, ..ProjectConfig::default() };
        let args = ConfigArgs { max_file_size: Some(9), ..ConfigArgs::default() };
        let after = args.apply(before.clone()).expect("an option was given");
        assert_eq!((after.exclude, after.token_limit, after.max_file_bytes), (before.exclude.clone(), 7, 9));
        assert_eq!(ConfigArgs::default().apply(before), None);
    }
}
