//! The command line as types, parsed by clap. Nothing here runs a command.

pub mod deferred;
pub mod global_options;
pub mod groups;
pub mod project_config;
pub mod resources;
pub mod supervision;
pub mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use fermata_protocol::pause::PauseMode;
use fermata_protocol::{AgentName, CheckpointNumber, ProjectName, RunId, Target};

use crate::units::parse_duration;
use deferred::Deferred;
use global_options::GlobalOptions;
use groups::{
    AgentCommand, CheckpointCommand, ContextCommand, DaemonCommand, OperationCommand, PluginCommand, ProjectCommand,
    TaskCommand,
};
use supervision::SupervisionArgs;
use values::{ItemRef, MODES, word};

/// Run, pause, checkpoint and resume AI agents.
#[derive(Debug, Parser)]
#[command(name = "fermatactl", version, propagate_version = false, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub globals: GlobalOptions,
    #[command(subcommand)]
    pub command: CliCommand,
}

#[derive(Debug, Subcommand)]
pub enum CliCommand {
    /// Start an agent; creates the project if it does not exist.
    Run(Deferred<RunArgs>),
    /// Start the agents declared in fermata.toml; agents that already run as declared are left alone.
    Up(Deferred<UpArgs>),
    /// Stop the agents declared in fermata.toml; checkpoints and logs are kept.
    Down(Deferred<DownArgs>),
    /// List agents.
    Ps {
        /// List the agents of this project only.
        project: Option<ProjectName>,
    },
    /// Show the state of a project, or of the daemon and all projects.
    Status {
        /// The project.
        project: Option<ProjectName>,
    },
    /// Pause a project: freeze its agents and create a checkpoint.
    Pause(Deferred<PauseArgs>),
    /// Resume a paused project, or restart an agent that timed out, was interrupted or failed.
    Resume {
        /// A paused project, or an ended agent (project/agent).
        target: Target,
        /// Restore this checkpoint first.
        #[arg(long, value_name = "N")]
        checkpoint: Option<CheckpointNumber>,
        /// Resume although a budget is exhausted; the budget is waived until it is set again.
        #[arg(long)]
        over_budget: bool,
    },
    /// Stop agents: SIGTERM, then SIGKILL to the process tree after a grace period.
    Stop {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// Time between SIGTERM and SIGKILL [default: the agent's own].
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        grace: Option<Duration>,
    },
    /// Restart agents.
    Restart {
        /// An agent (project/agent) or a whole project.
        target: Target,
    },
    /// Kill the process trees of agents, or send a signal to their main processes.
    Kill {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// Send this signal to the main process instead, for example USR1.
        #[arg(long, short, value_parser = values::signal)]
        signal: Option<String>,
    },
    /// Remove an ended agent, or a project.
    Rm {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// Also remove the project's checkpoints.
        #[arg(long)]
        with_checkpoints: bool,
    },
    /// Show an agent's output.
    Logs(Deferred<LogsArgs>),
    /// Attach to the terminal of an agent started with --tty.
    Attach(Deferred<AttachArgs>),
    /// Send input to the terminal of an agent started with --tty.
    Send(Deferred<SendArgs>),
    /// Wait until agents have ended and print their exit codes.
    Wait {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// Exit with the agent's exit code.
        #[arg(long)]
        propagate: bool,
    },
    /// Create, change and remove projects.
    #[command(subcommand)]
    Project(Deferred<ProjectCommand>),
    /// List, show and cancel operations.
    #[command(subcommand)]
    Op(Deferred<OperationCommand>),
    /// Create, compare, verify and restore checkpoints.
    #[command(subcommand, visible_alias = "cp")]
    Checkpoint(Deferred<CheckpointCommand>),
    /// List, search, pin and recall the context of agents.
    #[command(subcommand)]
    Context(Deferred<ContextCommand>),
    /// List, add and change tasks.
    #[command(subcommand)]
    Task(Deferred<TaskCommand>),
    /// List the questions of agents.
    Inbox {
        /// List the questions of this project only.
        project: Option<ProjectName>,
        /// Include answered questions.
        #[arg(long, short)]
        all: bool,
    },
    /// Answer a question of an agent.
    Answer {
        /// The question, as shown by inbox.
        #[arg(value_name = "PROJECT/NUMBER")]
        question: ItemRef,
        /// The answer.
        #[arg(required = true, num_args = 1..)]
        text: Vec<String>,
    },
    /// Show and follow the events of projects.
    Events(Deferred<EventsArgs>),
    /// List, check, reload, enable and disable plugins.
    #[command(subcommand)]
    Plugin(Deferred<PluginCommand>),
    /// Report to the daemon from inside an agent (uses FERMATA_SOCKET and FERMATA_TOKEN).
    #[command(subcommand)]
    Agent(Deferred<AgentCommand>),
    /// Control the daemon.
    #[command(subcommand)]
    Daemon(Deferred<DaemonCommand>),
    /// Check the installation and suggest fixes.
    Doctor,
    /// Print a shell completion script.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Call a protocol method by name.
    Call {
        /// The method.
        method: String,
        /// The parameters as a JSON object; `-` reads them from stdin.
        #[arg(value_name = "JSON")]
        params: Option<String>,
    },
    /// Show the versions of client and daemon.
    Version,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The project.
    #[arg(long, short)]
    pub project: ProjectName,
    /// The workspace of a new project [default: the current directory].
    #[arg(long, short, value_name = "DIR")]
    pub workspace: Option<PathBuf>,
    /// The agent's name [default: that of the program].
    #[arg(long, short)]
    pub name: Option<AgentName>,
    /// The working directory of the agent [default: the current directory].
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// The command that restarts the agent in its earlier session, as one line of shell words.
    #[arg(long, value_name = "WORDS", conflicts_with = "resume_args")]
    pub resume_command: Option<String>,
    /// One word of the resume command; repeat for each word.
    #[arg(long = "resume-arg", value_name = "WORD", allow_hyphen_values = true)]
    pub resume_args: Vec<String>,
    /// The profile of the tool [default: recognised from the program].
    #[arg(long)]
    pub profile: Option<String>,
    /// Time between SIGTERM and SIGKILL when the agent is stopped.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub stop_grace: Option<Duration>,
    #[command(flatten)]
    pub hooks: HookArgs,
    #[command(flatten)]
    pub resources: resources::ResourceArgs,
    #[command(flatten)]
    pub budget: resources::BudgetArgs,
    /// Allocate a terminal for the agent, of the size of this one (24 x 80 without one).
    #[arg(long, short)]
    pub tty: bool,
    /// Attach to the agent's terminal, like `attach`.
    #[arg(long, requires = "tty", conflicts_with_all = ["wait", "logs", "detach"])]
    pub attach: bool,
    /// Return once the agent has started (the default).
    #[arg(long, short, conflicts_with_all = ["wait", "logs"])]
    pub detach: bool,
    /// Wait until the agent has ended and exit with its exit code.
    #[arg(long)]
    pub wait: bool,
    /// Follow the agent's output until it has ended.
    #[arg(long)]
    pub logs: bool,
    #[command(flatten)]
    pub supervision: SupervisionArgs,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Commands that run before and after an agent.
#[derive(Debug, Args)]
pub struct HookArgs {
    /// Run this command before each start, in the agent's environment; its failure fails the start. One line of
    /// shell words.
    #[arg(long, value_name = "WORDS")]
    pub pre_start: Option<String>,
    /// Time limit of the pre-start command [default: 1m].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "pre_start")]
    pub pre_start_timeout: Option<Duration>,
    /// Run this command after each exit, with FERMATA_EXIT_CODE or FERMATA_EXIT_SIGNAL set. One line of shell words.
    #[arg(long, value_name = "WORDS")]
    pub post_stop: Option<String>,
    /// Time limit of the post-stop command [default: 1m].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "post_stop")]
    pub post_stop_timeout: Option<Duration>,
}

/// A fermata.toml, and which of its agents.
#[derive(Debug, Clone, Args)]
pub struct DeclaredArgs {
    /// Only these agents [default: all].
    #[arg(value_name = "AGENT")]
    pub agents: Vec<AgentName>,
    /// The file [default: the nearest fermata.toml in the current directory or above it, up to the home directory].
    #[arg(long, short, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    pub declared: DeclaredArgs,
    /// Check the file and show what would be done.
    #[arg(long)]
    pub dry_run: bool,
    /// Wait until every agent is ready or completed; exit code 1 if one fails.
    #[arg(long, short, conflicts_with = "dry_run")]
    pub wait: bool,
    /// Restart running agents whose declaration has changed.
    #[arg(long)]
    pub recreate: bool,
    /// Stop agents of the project that are not declared in the file.
    #[arg(long, conflicts_with = "agents")]
    pub remove_orphans: bool,
}

#[derive(Debug, Args)]
pub struct DownArgs {
    #[command(flatten)]
    pub declared: DeclaredArgs,
    /// Remove the agents after stopping them; checkpoints are kept.
    #[arg(long)]
    pub remove: bool,
    /// Pause the project and free its memory instead; `resume` restarts the agents.
    #[arg(long, conflicts_with_all = ["remove", "agents"])]
    pub pause: bool,
}

#[derive(Debug, Args)]
pub struct PauseArgs {
    /// The project; an agent may pause its own.
    pub project: ProjectName,
    /// The reason, stored with the pause and its checkpoint.
    #[arg(long, short)]
    pub reason: Option<String>,
    /// Keep the agents in memory (freeze), end them (park), or save process images (image).
    #[arg(long, value_parser = word::<PauseMode>(MODES), default_value = "freeze")]
    pub mode: PauseMode,
    /// How long agents may take to reach a safe point before they are frozen.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub grace: Option<Duration>,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The agent (project/agent), or a project with one agent.
    pub target: Target,
    /// Follow the output until the agent has ended.
    #[arg(long, short)]
    pub follow: bool,
    /// Start with the last N lines.
    #[arg(short = 'n', long = "tail", value_name = "N")]
    pub tail: Option<u64>,
    /// Show the output of the previous run.
    #[arg(long, short, conflicts_with = "run")]
    pub previous: bool,
    /// Show the output of this run only.
    #[arg(long, value_name = "ID")]
    pub run: Option<RunId>,
    /// Start at this time: 10m (ago) or an RFC 3339 timestamp.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Prefix each line with its time.
    #[arg(long, short)]
    pub timestamps: bool,
    /// Do not redact tokens, private keys and the values of the agent's secret variables.
    #[arg(long)]
    pub raw: bool,
}

/// The default key sequence that detaches from a terminal.
pub const DETACH_KEYS: &str = "ctrl-\\";

#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The agent (project/agent), or a project with one agent.
    pub target: Target,
    /// Watch without typing.
    #[arg(long, conflicts_with = "steal")]
    pub read_only: bool,
    /// Take over input from another attached client, which then only watches.
    #[arg(long)]
    pub steal: bool,
    /// The key sequence that detaches, for example ctrl-p,ctrl-q.
    #[arg(long, value_name = "KEYS", default_value = DETACH_KEYS)]
    pub detach_keys: String,
}

#[derive(Debug, Args)]
pub struct SendArgs {
    /// The agent (project/agent), or a project with one agent.
    pub target: Target,
    /// The text, sent literally; several words are joined by blanks.
    pub text: Vec<String>,
    /// Send stdin after the text.
    #[arg(long)]
    pub stdin: bool,
    /// Send these keys after the text, for example C-c,Enter.
    #[arg(long, value_name = "KEYS")]
    pub keys: Option<String>,
    /// Send Enter at the end.
    #[arg(long, short)]
    pub enter: bool,
    /// Send even if an attached client is typing.
    #[arg(long)]
    pub anyway: bool,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Follow new events; without --since-cursor, only those from now on.
    #[arg(long, short)]
    pub follow: bool,
    /// Start after this event.
    #[arg(long, value_name = "CURSOR")]
    pub since_cursor: Option<String>,
    /// Show the events of this project only.
    #[arg(long, short)]
    pub project: Option<ProjectName>,
    /// Show events of this kind only (`pause.*` matches all kinds of that prefix); may be repeated.
    #[arg(long, short, value_name = "KIND")]
    pub kind: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Clap detects such a collision only when the subcommand is used, by a panic.
    #[test]
    fn no_argument_has_the_name_of_a_global_flag() {
        deferred::declare_all();
        fn check(command: &clap::Command, globals: &[String]) {
            for sub in command.get_subcommands() {
                for argument in sub.get_arguments() {
                    let id = argument.get_id().to_string();
                    assert!(!globals.contains(&id), "'{id}' of '{}' is a global flag too", sub.get_name());
                }
                check(sub, globals);
            }
        }
        let command = Cli::command();
        let globals = command.get_arguments().filter(|argument| argument.is_global_set());
        let globals: Vec<String> = globals.map(|argument| argument.get_id().to_string()).collect();
        assert!(globals.contains(&"json".to_owned()));
        check(&command, &globals);
    }
}
