//! Commands that come in groups: `project ls`, `checkpoint restore`, `agent ask` …

use std::path::PathBuf;

use clap::{Args, Subcommand};
use fermata_protocol::context::{ItemType, Tier};
use fermata_protocol::task::Phase;
use fermata_protocol::task::TaskStatus;
use fermata_protocol::{CheckpointNumber, OperationId, ProjectName, Target};

use super::values::{ITEM_TYPES, Numbered, PHASES, TASK_STATUSES, TIERS, word};
use crate::units::{parse_bytes, parse_duration};

/// What of the workspace a checkpoint covers, and when context is saved.
#[derive(Debug, Args, Default)]
pub struct ConfigArgs {
    /// A pattern that is covered although an ignore rule excludes it; may be given several times.
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,
    /// A pattern that is not covered; may be given several times.
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Whether .gitignore files count.
    #[arg(long, value_name = "BOOL")]
    pub use_gitignore: Option<bool>,
    /// Larger files are skipped and reported, for instance 512MiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub max_file_size: Option<u64>,
    /// The token limit per agent.
    #[arg(long, value_name = "N")]
    pub token_limit: Option<u64>,
    /// At how many percent of the token limit a flash save is due.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub flash_save_at: Option<u8>,
    #[command(flatten)]
    pub budget: super::resources::BudgetArgs,
    #[command(flatten)]
    pub retention: super::resources::RetentionArgs,
    #[command(flatten)]
    pub automatic: super::project_config::AutomaticArgs,
}

/// `project …`
#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// Create a project.
    Create {
        /// Its name.
        name: ProjectName,
        /// Its workspace; the current directory when left out.
        #[arg(long, short, value_name = "DIR")]
        workspace: Option<PathBuf>,
        /// What it is for.
        #[arg(long, short, default_value = "")]
        description: String,
        /// Where the workspace came from: git, directory, or a word of your own.
        #[arg(long, value_name = "TYPE", requires = "source_location")]
        source_type: Option<String>,
        /// The URL or path that the workspace came from.
        #[arg(long, value_name = "URL", requires = "source_type")]
        source_location: Option<String>,
        /// The branch that the workspace came from.
        #[arg(long, value_name = "BRANCH", requires = "source_type")]
        source_branch: Option<String>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Change a project; settings that are not given stay.
    Set {
        /// The project.
        project: ProjectName,
        /// A new description.
        #[arg(long, short)]
        description: Option<String>,
        /// A new phase of the work.
        #[arg(long, value_parser = word::<Phase>(PHASES))]
        phase: Option<Phase>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// List the projects.
    Ls,
    /// Show a project with its agents.
    Show {
        /// The project.
        project: ProjectName,
    },
    /// Remove a project whose agents have ended.
    Rm {
        /// The project.
        project: ProjectName,
        /// Remove its checkpoints as well.
        #[arg(long)]
        with_checkpoints: bool,
    },
}

/// `op …`
#[derive(Debug, Subcommand)]
pub enum OperationCommand {
    /// List operations, newest first.
    Ls {
        /// Only those of this project.
        project: Option<ProjectName>,
        /// At most so many.
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

/// `checkpoint …`
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Make a checkpoint; agents stand still only for the snapshot.
    Create {
        /// The project; an agent's own when left out.
        project: Option<ProjectName>,
        /// Its name, at most 100 characters.
        #[arg(long, short)]
        name: Option<String>,
        /// Its description, at most 500 characters.
        #[arg(long, short, default_value = "")]
        description: String,
    },
    /// List the checkpoints of a project, newest first.
    Ls {
        /// The project.
        project: ProjectName,
        /// At most so many; all of them when left out.
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u32>,
    },
    /// Show a checkpoint with its parts and what it left out.
    Show {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
    },
    /// Compare a checkpoint with another, or with the workspace as it is.
    Diff {
        /// The project.
        project: ProjectName,
        /// The older point.
        from: CheckpointNumber,
        /// The newer point; the workspace when left out.
        to: Option<CheckpointNumber>,
        /// Show which paths differ and by how much, and the sums.
        #[arg(long, conflicts_with = "patch")]
        stat: bool,
        /// Show the text of the changes.
        #[arg(long, short)]
        patch: bool,
    },
    /// Restore a checkpoint, after a safety checkpoint of what is there.
    Restore {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// Only show what would change.
        #[arg(long)]
        dry_run: bool,
        /// Restore only these files and directories, and neither tasks nor context; paths inside the workspace.
        #[arg(long, value_name = "PATH", num_args = 1..)]
        paths: Vec<std::ffi::OsString>,
    },
    /// Rehash every part of one checkpoint or of all; exit code 1 when one is damaged.
    Verify {
        /// The project.
        project: ProjectName,
        /// The checkpoint; all of them when left out.
        checkpoint: Option<CheckpointNumber>,
        /// All of them, which is what leaving the checkpoint out means as well.
        #[arg(long, conflicts_with = "checkpoint")]
        all: bool,
    },
    /// Remove checkpoints; where one of them may not be removed, none is.
    Rm {
        /// The project.
        project: ProjectName,
        /// The checkpoints.
        #[arg(required = true, value_name = "CHECKPOINT")]
        checkpoints: Vec<CheckpointNumber>,
    },
    /// Remove what the project's retention no longer keeps, or what all the given bounds let go, the oldest first.
    ///
    /// Pinned checkpoints, those in use and the newest of all always stay.
    Prune {
        /// The project.
        project: ProjectName,
        /// The newest so many stay, whatever made them.
        #[arg(long, value_name = "N")]
        keep: Option<u64>,
        /// Those younger than this stay, for instance 12h or 7d.
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        older_than: Option<std::time::Duration>,
        /// No more go once the project's checkpoints take at most this, for instance 2G.
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        max_bytes: Option<u64>,
        /// Only show what would go.
        #[arg(long)]
        dry_run: bool,
    },
    /// Write a checkpoint to one file, which another machine can import.
    Export {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// The file; it must not exist.
        file: PathBuf,
    },
    /// Make a checkpoint of a file that was exported, under a new number.
    Import {
        /// The project.
        project: ProjectName,
        /// The file.
        file: PathBuf,
    },
    /// Write the history's many packs as one; done by itself when it is worth it.
    Consolidate {
        /// The project.
        project: ProjectName,
        /// Write everything anew, for the smallest result.
        #[arg(long)]
        everything: bool,
    },
    /// Keep a checkpoint whatever the retention says.
    Pin {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
    },
    /// Leave a checkpoint to the retention again.
    Unpin {
        /// The project.
        project: ProjectName,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
    },
}

/// `context …`
#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// List context items, newest first.
    Ls {
        /// A project or an agent; the caller itself when an agent calls.
        target: Option<Target>,
        /// Only this tier.
        #[arg(long, value_parser = word::<Tier>(TIERS))]
        tier: Option<Tier>,
        /// Only archived (true) or only unarchived (false) items.
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        archived: Option<bool>,
        /// At most so many; 100 when left out.
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u32>,
        /// Only ids below this one, for the next page.
        #[arg(long, value_name = "ID")]
        before: Option<i64>,
    },
    /// Show an item whole; this counts as an access.
    Show {
        /// The item.
        #[arg(value_name = "[PROJECT/]ID")]
        item: Numbered,
    },
    /// Add an item.
    Add {
        /// The agent that knows it.
        target: Target,
        #[command(flatten)]
        item: ItemArgs,
    },
    /// Keep an item hot.
    Pin {
        /// The item.
        #[arg(value_name = "[PROJECT/]ID")]
        item: Numbered,
    },
    /// Let an item's score decide again.
    Unpin {
        /// The item.
        #[arg(value_name = "[PROJECT/]ID")]
        item: Numbered,
    },
    /// Search items, archived ones included.
    Search {
        /// A project or an agent; the caller itself when an agent calls.
        #[arg(long, short)]
        target: Option<Target>,
        /// At most so many; 20 when left out.
        #[arg(short = 'n', long, value_name = "N")]
        limit: Option<u32>,
        /// Words that the text must hold.
        #[arg(required = true)]
        words: Vec<String>,
    },
    /// Bring archived items back.
    Recall {
        /// The items; a project stands for those after it too.
        #[arg(value_name = "[PROJECT/]ID", required = true)]
        items: Vec<Numbered>,
    },
    /// Re-score, re-tier and archive the cold items.
    FlashSave {
        /// A project or an agent; the caller itself when an agent calls.
        target: Option<Target>,
    },
}

/// A context item on the command line.
#[derive(Debug, Args)]
pub struct ItemArgs {
    /// What kind of knowledge it is.
    #[arg(long = "type", short = 't', value_name = "TYPE", ignore_case = true,
          value_parser = word::<ItemType>(ITEM_TYPES), default_value = "OTHER")]
    pub kind: ItemType,
    /// Keep it hot.
    #[arg(long)]
    pub pinned: bool,
    /// The text; read from stdin when left out or `-`.
    pub text: Option<String>,
}

/// `task …`
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// List the tasks of a project.
    Ls {
        /// The project; an agent's own when left out.
        project: Option<ProjectName>,
    },
    /// Add a task.
    Add {
        /// The project, or the agent that does it.
        target: Target,
        /// What is to be done.
        title: String,
        #[command(flatten)]
        state: TaskState,
    },
    /// Change a task.
    Set {
        /// The task.
        #[arg(value_name = "[PROJECT/]NUMBER")]
        task: Numbered,
        /// A new title.
        #[arg(long)]
        title: Option<String>,
        #[command(flatten)]
        state: TaskState,
    },
}

/// Where a task stands.
#[derive(Debug, Args)]
pub struct TaskState {
    /// Its status.
    #[arg(long, short, value_parser = word::<TaskStatus>(TASK_STATUSES))]
    pub status: Option<TaskStatus>,
    /// How much of it is done, 0 to 100.
    #[arg(long, value_name = "0..100", value_parser = percent)]
    pub percent: Option<f64>,
}

/// `plugin …`
#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// List plugins.
    Ls,
    /// Pick up new, changed and removed plugins.
    Reload,
    /// Switch a plugin on.
    Enable {
        /// The plugin.
        name: String,
    },
    /// Switch a plugin off.
    Disable {
        /// The plugin.
        name: String,
    },
    /// Load a shared object in a host of its own and describe it.
    Check {
        /// The shared object.
        path: PathBuf,
    },
}

/// `daemon …`
#[derive(Debug, Subcommand)]
pub enum DaemonCommand {
    /// Read the configuration again.
    Reload,
}

/// `agent …`; `--target` is for people who report in an agent's stead.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Report progress.
    Progress {
        /// How much is done, 0 to 100.
        #[arg(value_parser = percent)]
        percent: Option<f64>,
        /// What the agent is doing.
        #[arg(long, short)]
        message: Option<String>,
        /// Units of work done since it began.
        #[arg(long, value_name = "N")]
        units: Option<u64>,
        /// The phase that the project's work is in.
        #[arg(long, value_parser = word::<Phase>(PHASES))]
        phase: Option<Phase>,
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Say that the agent is still there: what it reported before stands.
    Heartbeat {
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Say that the agent has come up and can be depended on.
    Ready {
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Add a context item.
    Context {
        #[command(flatten)]
        item: ItemArgs,
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Add a task, or change one with --id.
    Task {
        /// What is to be done; needed for a new task.
        #[arg(required_unless_present = "id")]
        title: Option<String>,
        /// The task to change.
        #[arg(long)]
        id: Option<u64>,
        #[command(flatten)]
        state: TaskState,
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Ask a person; prints the question's number, or with --wait the answer.
    Ask {
        /// What to ask.
        text: String,
        /// An answer to choose from; may be given several times.
        #[arg(long, short)]
        choice: Vec<String>,
        /// Wait for the answer; exit code 5 when it is still open after --timeout.
        #[arg(long, short)]
        wait: bool,
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Wait for the answer to a question; exit code 5 when it is still open after --timeout.
    WaitAnswer {
        /// The question.
        #[arg(value_name = "[PROJECT/]NUMBER")]
        question: Numbered,
    },
    /// Say that the agent stands at a good place for the requested pause.
    Ack {
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Keep or show the agent's own state, a JSON value that every checkpoint holds.
    #[command(subcommand)]
    State(StateCommand),
    /// Report tokens and cost since the last report.
    Usage {
        /// Tokens sent to the model.
        #[arg(long, value_name = "TOKENS", default_value_t = 0)]
        input: u64,
        /// Tokens that the model wrote.
        #[arg(long, value_name = "TOKENS", default_value_t = 0)]
        output: u64,
        /// Cost in US dollars, for instance 0.0123.
        #[arg(long, value_name = "USD", value_parser = micro_usd, default_value = "0")]
        cost: u64,
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Print one JSON line for each pause request, until the daemon ends.
    Listen,
}

/// `agent state …`
#[derive(Debug, Subcommand)]
pub enum StateCommand {
    /// Show the state.
    Get {
        /// The agent, when it is not the caller.
        #[arg(long)]
        target: Option<Target>,
    },
    /// Keep a state.
    Put {
        /// The JSON value; read from stdin when left out or `-`.
        #[arg(value_name = "JSON")]
        value: Option<String>,
        /// The agent, when it is not the caller.
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

/// Dollars to millionths, without the rounding of floating point.
fn micro_usd(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no cost in dollars with at most six decimals");
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if fraction.len() > 6 || !digits(whole) || !digits(fraction) || text.len() < 2 && whole.is_empty() {
        return Err(wrong());
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| wrong())? };
    let fraction: u64 = format!("{fraction:0<6}").parse().map_err(|_| wrong())?;
    whole.checked_mul(1_000_000).and_then(|micro| micro.checked_add(fraction)).ok_or_else(wrong)
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
