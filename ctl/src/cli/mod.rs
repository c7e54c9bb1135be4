//! The command line as a type: commands, arguments and global flags. Nothing here does anything.

pub mod deferred;
pub mod groups;
pub mod project_config;
pub mod resources;
pub mod supervision;
pub mod values;
pub mod workspace;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fermata_protocol::pause::PauseMode;
use fermata_protocol::{AgentName, CheckpointNumber, ProjectName, RunId, Target};

use crate::units::parse_duration;
use deferred::Late;
use groups::{
    AgentCommand, CheckpointCommand, ContextCommand, DaemonCommand, OperationCommand, PluginCommand, ProjectCommand,
    TaskCommand,
};
use supervision::SupervisionArgs;
use values::{MODES, Numbered, word};
use workspace::{DownArgs, UpArgs};

/// Runs AI agents, holds them on demand and brings them back.
#[derive(Debug, Parser)]
#[command(name = "fermatactl", version, propagate_version = false, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub globals: Globals,
    #[command(subcommand)]
    pub command: Command,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ColorChoice {
    #[default]
    Auto,
    Always,
    Never,
}

/// Flags that every command takes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct Globals {
    /// Write JSON: one object, or one line per row of a list.
    #[arg(long, global = true, conflicts_with = "quiet")]
    pub json: bool,
    /// Write ids only.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// The daemon's socket (FERMATA_SOCKET).
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Do not start a daemon when none runs.
    #[arg(long, global = true)]
    pub no_autostart: bool,
    /// The state directory of a daemon that this command starts (FERMATA_STATE_DIR).
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The directory of the daemon's socket (FERMATA_RUNTIME_DIR).
    #[arg(long, global = true, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// When to use colours.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: ColorChoice,
    /// Give up after this time, with exit code 6 (for instance 500ms, 10s, 2m).
    #[arg(long, global = true, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

impl Globals {
    /// Takes from the environment what was not given; an empty variable is none.
    ///
    /// `--runtime-dir` beats `FERMATA_SOCKET`: what was typed counts more than what was inherited.
    #[must_use]
    pub fn with_environment(mut self, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let path = |name| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if self.socket.is_none() && self.runtime_dir.is_none() {
            self.socket = path("FERMATA_SOCKET");
        }
        self.runtime_dir = self.runtime_dir.or_else(|| path("FERMATA_RUNTIME_DIR"));
        self.state_dir = self.state_dir.or_else(|| path("FERMATA_STATE_DIR"));
        self
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start an agent in a project, which is created when it is new.
    Run(Late<RunArgs>),
    /// Start what the workspace's fermata.toml declares, and leave alone what runs as declared.
    Up(Late<UpArgs>),
    /// Stop what the workspace's fermata.toml declares; checkpoints and logs stay.
    Down(Late<DownArgs>),
    /// List agents.
    Ps {
        /// Only those of this project.
        project: Option<ProjectName>,
    },
    /// Show a project, or the daemon and all projects.
    Status {
        /// The project.
        project: Option<ProjectName>,
    },
    /// Hold a project: quiesce, freeze, flash save, checkpoint.
    Pause(Late<PauseArgs>),
    /// Let a paused project go on, or bring back one agent that timed out, was interrupted or failed.
    Resume {
        /// A paused project, or an agent (project/agent) that has ended.
        target: Target,
        /// Restore this checkpoint of the project first.
        #[arg(long, value_name = "N")]
        checkpoint: Option<CheckpointNumber>,
        /// Let it go on although a budget is reached; that budget then bounds nothing until it is set anew.
        #[arg(long)]
        over_budget: bool,
    },
    /// Stop agents: SIGTERM, grace, SIGKILL to the whole tree.
    Stop {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// How long to wait before SIGKILL; the agent's own grace when left out.
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        grace: Option<Duration>,
    },
    /// Stop agents and start them again.
    Restart {
        /// An agent (project/agent) or a whole project.
        target: Target,
    },
    /// Kill agents' whole trees at once, or send a signal to their main process.
    Kill {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// The signal for the main process, for instance USR1.
        #[arg(long, short, value_parser = values::signal)]
        signal: Option<String>,
    },
    /// Remove an agent that has ended, or a project.
    Rm {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// Remove the project's checkpoints as well.
        #[arg(long)]
        with_checkpoints: bool,
    },
    /// Show an agent's output.
    Logs(Late<LogsArgs>),
    /// Sit at the terminal of an agent that was started with --tty.
    Attach(Late<AttachArgs>),
    /// Type into the terminal of an agent that was started with --tty.
    Send(Late<SendArgs>),
    /// Wait until agents have ended, and print their exit codes.
    Wait {
        /// An agent (project/agent) or a whole project.
        target: Target,
        /// Exit with the agent's own code.
        #[arg(long)]
        propagate: bool,
    },
    /// Create, change and remove projects.
    #[command(subcommand)]
    Project(Late<ProjectCommand>),
    /// Look at operations and cancel them.
    #[command(subcommand)]
    Op(Late<OperationCommand>),
    /// Make, compare, verify and restore checkpoints.
    #[command(subcommand, visible_alias = "cp")]
    Checkpoint(Late<CheckpointCommand>),
    /// Look at what agents know, search it and bring it back.
    #[command(subcommand)]
    Context(Late<ContextCommand>),
    /// Look at tasks and change them.
    #[command(subcommand)]
    Task(Late<TaskCommand>),
    /// List the questions that agents have asked.
    Inbox {
        /// Only those of this project.
        project: Option<ProjectName>,
        /// Also those that were answered.
        #[arg(long, short)]
        all: bool,
    },
    /// Answer a question of an agent.
    Answer {
        /// The question, as the inbox shows it.
        #[arg(value_name = "PROJECT/NUMBER")]
        question: Numbered,
        /// The answer.
        #[arg(required = true, num_args = 1..)]
        text: Vec<String>,
    },
    /// Show what happened, and follow what happens.
    Events(Late<EventsArgs>),
    /// Look at plugins, reload them, switch them on and off.
    #[command(subcommand)]
    Plugin(Late<PluginCommand>),
    /// What an agent says of itself (uses FERMATA_SOCKET and FERMATA_TOKEN).
    #[command(subcommand)]
    Agent(Late<AgentCommand>),
    /// Control the daemon.
    #[command(subcommand)]
    Daemon(Late<DaemonCommand>),
    /// Check that everything is in place, and say what to do where it is not.
    Doctor,
    /// Write a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Call a method of the protocol by name.
    Call {
        /// The method.
        method: String,
        /// Its parameters as a JSON object; `-` reads them from stdin.
        #[arg(value_name = "JSON")]
        params: Option<String>,
    },
    /// Show the versions of client and daemon.
    Version,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The project.
    #[arg(long, short)]
    pub project: ProjectName,
    /// The workspace of a new project; the current directory when left out.
    #[arg(long, short, value_name = "DIR")]
    pub workspace: Option<PathBuf>,
    /// The agent's name; the program's when left out.
    #[arg(long, short)]
    pub name: Option<AgentName>,
    /// The working directory; the current one when left out.
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// The command that brings the agent back, as one line of shell words.
    #[arg(long, value_name = "WORDS", conflicts_with = "resume_args")]
    pub resume_command: Option<String>,
    /// One word of the command that brings the agent back; give it once per word.
    #[arg(long = "resume-arg", value_name = "WORD", allow_hyphen_values = true)]
    pub resume_args: Vec<String>,
    /// The profile that knows the tool; recognised by the program when left out.
    #[arg(long)]
    pub profile: Option<String>,
    /// How long a stop waits between SIGTERM and SIGKILL.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub stop_grace: Option<Duration>,
    #[command(flatten)]
    pub hooks: HookArgs,
    #[command(flatten)]
    pub resources: resources::ResourceArgs,
    #[command(flatten)]
    pub budget: resources::BudgetArgs,
    /// Give the agent a terminal, as large as this one (24 x 80 where there is none).
    #[arg(long, short)]
    pub tty: bool,
    /// Attach to the agent's terminal; as `attach` does.
    #[arg(long, requires = "tty", conflicts_with_all = ["wait", "logs", "detach"])]
    pub attach: bool,
    /// Return once the agent has started (the default).
    #[arg(long, short, conflicts_with_all = ["wait", "logs"])]
    pub detach: bool,
    /// Wait for the agent's end and exit with its code.
    #[arg(long)]
    pub wait: bool,
    /// Show the agent's output until it has ended.
    #[arg(long)]
    pub logs: bool,
    #[command(flatten)]
    pub supervision: SupervisionArgs,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// The commands beside an agent.
#[derive(Debug, Args)]
pub struct HookArgs {
    /// A command that runs before each start, in the agent's place; the start fails with it. One
    /// line of shell words.
    #[arg(long, value_name = "WORDS")]
    pub pre_start: Option<String>,
    /// How long it may take; one minute when left out.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "pre_start")]
    pub pre_start_timeout: Option<Duration>,
    /// A command that runs after each end, with FERMATA_EXIT_CODE or FERMATA_EXIT_SIGNAL. One line
    /// of shell words.
    #[arg(long, value_name = "WORDS")]
    pub post_stop: Option<String>,
    /// How long it may take; one minute when left out.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "post_stop")]
    pub post_stop_timeout: Option<Duration>,
}

/// Arguments of `pause`.
#[derive(Debug, Args)]
pub struct PauseArgs {
    /// The project; an agent that pauses its own project names it too.
    pub project: ProjectName,
    /// Why; kept with the pause and its checkpoint.
    #[arg(long, short)]
    pub reason: Option<String>,
    /// How to hold it: in memory, ended, or as a process image.
    #[arg(long, value_parser = word::<PauseMode>(MODES), default_value = "freeze")]
    pub mode: PauseMode,
    /// How long the agents have to come to a good place.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub grace: Option<Duration>,
}

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The agent (project/agent), or a project with one agent.
    pub target: Target,
    /// Go on until the agent has ended.
    #[arg(long, short)]
    pub follow: bool,
    /// Begin with the last N lines.
    #[arg(short = 'n', long = "tail", value_name = "N")]
    pub tail: Option<u64>,
    /// The output of the run before the present one.
    #[arg(long, short, conflicts_with = "run")]
    pub previous: bool,
    /// The output of this run alone (`status` shows the present one's id).
    #[arg(long, value_name = "ID")]
    pub run: Option<RunId>,
    /// Begin with what was written since: 10m (ago) or an RFC 3339 time.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Put the time in front of each line.
    #[arg(long, short)]
    pub timestamps: bool,
    /// Show the output as it is; tokens, private keys and the values of the agent's own secret
    /// variables are taken out of it otherwise.
    #[arg(long)]
    pub raw: bool,
}

/// The keys that leave an agent's terminal, unless others are named.
pub const DETACH_KEYS: &str = "ctrl-\\";

/// Arguments of `attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The agent (project/agent), or a project with one agent.
    pub target: Target,
    /// Only watch.
    #[arg(long, conflicts_with = "steal")]
    pub read_only: bool,
    /// Type even if somebody else does, who only watches from then on.
    #[arg(long)]
    pub steal: bool,
    /// The keys that leave, pressed one after the other, for instance ctrl-p,ctrl-q.
    #[arg(long, value_name = "KEYS", default_value = DETACH_KEYS)]
    pub detach_keys: String,
}

/// Arguments of `send`.
#[derive(Debug, Args)]
pub struct SendArgs {
    /// The agent (project/agent), or a project with one agent.
    pub target: Target,
    /// What to type, as it is; several words are joined by blanks.
    pub text: Vec<String>,
    /// Type what comes from stdin after it.
    #[arg(long)]
    pub stdin: bool,
    /// Press these keys after it, for instance C-c,Enter.
    #[arg(long, value_name = "KEYS")]
    pub keys: Option<String>,
    /// Press Enter at the end.
    #[arg(long, short)]
    pub enter: bool,
    /// Type even if somebody is attached who types.
    #[arg(long)]
    pub anyway: bool,
}

/// Arguments of `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on with what happens; without --since-cursor from now on.
    #[arg(long, short)]
    pub follow: bool,
    /// Go on after this event.
    #[arg(long, value_name = "CURSOR")]
    pub since_cursor: Option<String>,
    /// Only events of this project.
    #[arg(long, short)]
    pub project: Option<ProjectName>,
    /// Only this kind (`pause.*` takes all that begin so); may be given several times.
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

    /// Clap finds such a collision only when the command is used, and panics then.
    #[test]
    fn no_argument_has_the_name_of_a_global_flag() {
        deferred::describe_all();
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

    #[test]
    fn what_was_typed_counts_more_than_the_environment() {
        let variable = |name: &str| match name {
            "FERMATA_SOCKET" => Some(OsString::from("/env.sock")),
            "FERMATA_STATE_DIR" => Some(OsString::new()),
            _ => None,
        };
        let globals = Globals::default().with_environment(variable);
        assert_eq!(globals.socket, Some("/env.sock".into()));
        assert_eq!(globals.state_dir, None);
        let typed = Globals { runtime_dir: Some("/typed".into()), ..Globals::default() };
        assert_eq!(typed.with_environment(variable).socket, None);
    }
}
