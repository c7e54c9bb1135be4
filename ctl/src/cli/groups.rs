//! Subcommands of `project`, `op`, `checkpoint`, `context`, `task`, `plugin`, `daemon` and `agent`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use fermata_protocol::context::{ItemType, Tier};
use fermata_protocol::task::Phase;
use fermata_protocol::task::TaskStatus;
use fermata_protocol::{CheckpointNumber, OperationId, ProjectName, Target};

use super::project_config::ConfigArgs;
use super::values::{ITEM_TYPES, ItemRef, PHASES, TASK_STATUSES, TIERS, word};
use crate::units::{parse_bytes, parse_duration};

#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// Create a project.
    Create {
        /// The name.
        name: ProjectName,
        /// The workspace [default: the current directory].
        #[arg(long, short, value_name = "DIR")]
        workspace: Option<PathBuf>,
        /// A description.
        #[arg(long, short, default_value = "")]
        description: String,
        /// The kind of origin of the workspace: git, directory, or any other word.
        #[arg(long, value_name = "TYPE", requires = "source_location")]
        source_type: Option<String>,
        /// The URL or path of the origin.
        #[arg(long, value_name = "URL", requires = "source_type")]
        source_location: Option<String>,
        /// The branch of the origin.
        #[arg(long, value_name = "BRANCH", requires = "source_type")]
        source_branch: Option<String>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Change a project; settings that are not given are kept.
    Set {
        /// The project.
        project: ProjectName,
        /// The new description.
        #[arg(long, short)]
        description: Option<String>,
        /// The new phase of the project.
        #[arg(long, value_parser = word::<Phase>(PHASES))]
        phase: Option<Phase>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// List projects.
    Ls,
    /// Show a project with its agents.
    Show {
        /// The project.
        project: ProjectName,
    },
    /// Remove a project whose agents have all ended.
    Rm {
        /// The project.
        project: ProjectName,
        /// Also remove its checkpoints.
        #[arg(long)]
        with_checkpoints: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum OperationCommand {
    /// List operations, newest first.
    Ls {
        /// List those of this project only.
        project: Option<ProjectName>,
        /// List at most N.
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u32>,
    },
    /// Show an operation with its steps.
    Show {
        /// The operation.
        operation: OperationId,
    },
    /// Cancel an operation and undo it.
    Cancel {
        /// The operation.
        operation: OperationId,
    },
}

#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Create a checkpoint; agents are frozen only while the workspace is captured.
    Create {
        /// The project [default: that of the calling agent].
        project: Option<ProjectName>,
        /// A name of at most 100 characters.
        #[arg(long, short)]
        name: Option<String>,
        /// A description of at most 500 characters.
        #[arg(long, short, default_value = "")]
        description: String,
    },
    /// List the checkpoints of a project, newest first.
    Ls {
        /// The project.
        project: ProjectName,
        /// List at most N [default: all].
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u32>,
    },
    /// Show a checkpoint with its parts and skipped files.
    Show {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
    },
    /// Compare a checkpoint with another one or with the current workspace.
    Diff {
        /// The project.
        project: ProjectName,
        /// The older checkpoint.
        from: CheckpointNumber,
        /// The newer checkpoint [default: the current workspace].
        to: Option<CheckpointNumber>,
        /// Add totals to the list of changed paths.
        #[arg(long, conflicts_with = "patch")]
        stat: bool,
        /// Show the changes as a patch.
        #[arg(long, short)]
        patch: bool,
    },
    /// Restore a checkpoint, after creating a safety checkpoint of the current state.
    Restore {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// Only show what would change.
        #[arg(long)]
        dry_run: bool,
        /// Restore only these files and directories of the workspace, not tasks and context.
        #[arg(long, value_name = "PATH", num_args = 1..)]
        paths: Vec<std::ffi::OsString>,
    },
    /// Verify the hashes of one checkpoint or all; exit code 1 if one is damaged.
    Verify {
        /// The project.
        project: ProjectName,
        /// The checkpoint [default: all].
        checkpoint: Option<CheckpointNumber>,
        /// Verify all checkpoints, as without a checkpoint.
        #[arg(long, conflicts_with = "checkpoint")]
        all: bool,
    },
    /// Remove checkpoints: all of the given ones, or none if one cannot be removed.
    Rm {
        /// The project.
        project: ProjectName,
        /// The checkpoints.
        #[arg(required = true, value_name = "CHECKPOINT")]
        checkpoints: Vec<CheckpointNumber>,
    },
    /// Remove the checkpoints that the project's retention, or all of the given limits, no longer keep; oldest first.
    ///
    /// Pinned checkpoints, those in use and the newest one are never removed.
    Prune {
        /// The project.
        project: ProjectName,
        /// Keep the newest N, whatever triggered them.
        #[arg(long, value_name = "N")]
        keep: Option<u64>,
        /// Keep those younger than this, for example 12h or 7d.
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        older_than: Option<std::time::Duration>,
        /// Stop once the project's checkpoints take at most this much disk space, for example 2G.
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        max_bytes: Option<u64>,
        /// Only show what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Export a checkpoint to a file that another machine can import.
    Export {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// The file to create.
        file: PathBuf,
    },
    /// Import an exported checkpoint under a new number.
    Import {
        /// The project.
        project: ProjectName,
        /// The file.
        file: PathBuf,
    },
    /// Repack the history into one pack; the daemon also does this by itself.
    Consolidate {
        /// The project.
        project: ProjectName,
        /// Recompress every object, for the smallest result.
        #[arg(long)]
        everything: bool,
    },
    /// Exempt a checkpoint from retention.
    Pin {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
    },
    /// Make a checkpoint subject to retention again.
    Unpin {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
    },
}

#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// List context items, newest first.
    Ls {
        /// A project or an agent [default: the calling agent].
        target: Option<Target>,
        /// List this tier only.
        #[arg(long, value_parser = word::<Tier>(TIERS))]
        tier: Option<Tier>,
        /// List archived items only (true) or unarchived items only (false).
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        archived: Option<bool>,
        /// List at most N [default: 100].
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u32>,
        /// List ids below this one, for the next page.
        #[arg(long, value_name = "ID")]
        before: Option<i64>,
    },
    /// Show the full text of an item; counts as an access.
    Show {
        /// The item.
        #[arg(value_name = "[PROJECT/]ID")]
        item: ItemRef,
    },
    /// Add an item.
    Add {
        /// The agent that owns the item.
        target: Target,
        #[command(flatten)]
        item: ItemArgs,
    },
    /// Pin an item to the hot tier.
    Pin {
        /// The item.
        #[arg(value_name = "[PROJECT/]ID")]
        item: ItemRef,
    },
    /// Unpin an item: its score decides the tier again.
    Unpin {
        /// The item.
        #[arg(value_name = "[PROJECT/]ID")]
        item: ItemRef,
    },
    /// Search items, including archived ones.
    Search {
        /// A project or an agent [default: the calling agent].
        #[arg(long, short)]
        target: Option<Target>,
        /// List at most N [default: 20].
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u32>,
        /// Words that the text must contain.
        #[arg(required = true)]
        words: Vec<String>,
    },
    /// Recall archived items.
    Recall {
        /// The items; the project of the first item applies to the others.
        #[arg(value_name = "[PROJECT/]ID", required = true)]
        items: Vec<ItemRef>,
    },
    /// Recompute scores and tiers, and archive cold items.
    FlashSave {
        /// A project or an agent [default: the calling agent].
        target: Option<Target>,
    },
}

/// A new context item.
#[derive(Debug, Args)]
pub struct ItemArgs {
    /// The type of the item.
    #[arg(long = "type", short = 't', value_name = "TYPE", ignore_case = true,
          value_parser = word::<ItemType>(ITEM_TYPES), default_value = "OTHER")]
    pub kind: ItemType,
    /// Pin the item to the hot tier.
    #[arg(long)]
    pub pinned: bool,
    /// The text [default: read from stdin; also with `-`].
    pub text: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// List the tasks of a project.
    Ls {
        /// The project [default: that of the calling agent].
        project: Option<ProjectName>,
    },
    /// Add a task.
    Add {
        /// The project, or the agent that works on the task.
        target: Target,
        /// The title.
        title: String,
        #[command(flatten)]
        state: TaskState,
    },
    /// Change a task.
    Set {
        /// The task.
        #[arg(value_name = "[PROJECT/]NUMBER")]
        task: ItemRef,
        /// The new title.
        #[arg(long)]
        title: Option<String>,
        #[command(flatten)]
        state: TaskState,
    },
}

/// The status and progress of a task.
#[derive(Debug, Args)]
pub struct TaskState {
    /// The status.
    #[arg(long, short, value_parser = word::<TaskStatus>(TASK_STATUSES))]
    pub status: Option<TaskStatus>,
    /// The percentage done, 0 to 100.
    #[arg(long, value_name = "0..100", value_parser = percent)]
    pub percent: Option<f64>,
}

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// List plugins.
    Ls,
    /// Load new and changed plugins, and unload removed ones.
    Reload,
    /// Enable a plugin.
    Enable {
        /// The plugin.
        name: String,
    },
    /// Disable a plugin.
    Disable {
        /// The plugin.
        name: String,
    },
    /// Load a shared object in a separate host process and describe it.
    Check {
        /// The shared object.
        path: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum DaemonCommand {
    /// Reload the configuration.
    Reload,
}

/// Subcommands of `agent`. People who report in place of an agent name it with `--target`.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Report progress.
    Progress {
        /// The percentage done, 0 to 100.
        #[arg(value_parser = percent)]
        percent: Option<f64>,
        /// What the agent is doing.
        #[arg(long, short)]
        message: Option<String>,
        /// Units of work done since the agent started.
        #[arg(long, value_name = "N")]
        units: Option<u64>,
        /// The phase of the project.
        #[arg(long, value_parser = word::<Phase>(PHASES))]
        phase: Option<Phase>,
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Report that the agent is alive, without new progress.
    Heartbeat {
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Report that the agent is ready.
    Ready {
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Add a context item.
    Context {
        #[command(flatten)]
        item: ItemArgs,
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Add a task, or change an existing one with --id.
    Task {
        /// The title; required for a new task.
        #[arg(required_unless_present = "id")]
        title: Option<String>,
        /// The task to change.
        #[arg(long)]
        id: Option<u64>,
        #[command(flatten)]
        state: TaskState,
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Ask a question; prints its number, or with --wait the answer.
    Ask {
        /// The question.
        text: String,
        /// A possible answer; may be repeated.
        #[arg(long, short)]
        choice: Vec<String>,
        /// Wait for the answer; exit code 5 if the question is still open after --timeout.
        #[arg(long, short)]
        wait: bool,
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Wait for the answer to a question; exit code 5 if it is still open after --timeout.
    WaitAnswer {
        /// The question.
        #[arg(value_name = "[PROJECT/]NUMBER")]
        question: ItemRef,
    },
    /// Acknowledge a pause request: the agent is at a safe point.
    Ack {
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Store or show the agent's own state, a JSON value that is part of every checkpoint.
    #[command(subcommand)]
    State(StateCommand),
    /// Report tokens and cost since the last report.
    Usage {
        /// Tokens sent to the model.
        #[arg(long, value_name = "TOKENS", default_value_t = 0)]
        input: u64,
        /// Tokens received from the model.
        #[arg(long, value_name = "TOKENS", default_value_t = 0)]
        output: u64,
        /// Cost in US dollars, for example 0.0123.
        #[arg(long, value_name = "USD", value_parser = micro_usd, default_value = "0")]
        cost: u64,
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Print one JSON line per pause request, until the daemon shuts down.
    Listen,
}

#[derive(Debug, Subcommand)]
pub enum StateCommand {
    /// Show the state.
    Get {
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
    /// Store the state.
    Put {
        /// The JSON value [default: read from stdin; also with `-`].
        #[arg(value_name = "JSON")]
        value: Option<String>,
        /// The agent [default: the calling agent].
        #[arg(long)]
        target: Option<Target>,
    },
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.trim_end_matches('%').parse::<f64>();
    match number {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err(format!("'{text}' is not a number from 0 to 100")),
    }
}

/// Parses dollars into millionths exactly, without floating point.
fn micro_usd(text: &str) -> Result<u64, String> {
    let invalid = || format!("'{text}' is not an amount in dollars with at most six decimals");
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if fraction.len() > 6 || !digits(whole) || !digits(fraction) || text.len() < 2 && whole.is_empty() {
        return Err(invalid());
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
    let fraction: u64 = format!("{fraction:0<6}").parse().map_err(|_| invalid())?;
    whole.checked_mul(1_000_000).and_then(|micro| micro.checked_add(fraction)).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_become_millionths_exactly() {
        for (text, micro) in [("0", 0), ("0.0123", 12_300), ("1.5", 1_500_000), (".25", 250_000)] {
            assert_eq!(micro_usd(text), Ok(micro), "{text}");
        }
        for bad in ["", ".", "-1", "1.2345678", "x", "1e3", "99999999999999999999"] {
            assert!(micro_usd(bad).is_err(), "{bad}");
        }
    }
}
