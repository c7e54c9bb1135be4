//! How an agent is supervised, as options of `run`: the same settings as in a `fermata.toml`.

use std::time::Duration;

use clap::Args;
use fermata_protocol::AgentName;
use fermata_protocol::supervision::{
    Dependency, DependencyState, OnStale, OutputPolicy, Readiness, ReadyWhen, Recover, Restart, RestartPolicy,
    Supervision,
};

use super::values::split_words;
use crate::errors::CommandError;
use crate::units::{millis, parse_duration};

/// Restarts, dependencies, readiness and time limits.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Supervision")]
pub struct SupervisionArgs {
    /// When to restart the agent: no, on-failure or always.
    #[arg(long, value_name = "WHEN", value_parser = restart_policy)]
    pub restart: Option<RestartPolicy>,
    /// Delay before the first restart; it doubles with each consecutive restart.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "restart")]
    pub restart_delay: Option<Duration>,
    /// Maximum delay before a restart.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "restart")]
    pub restart_max_delay: Option<Duration>,
    /// Maximum number of consecutive restarts; 0 means no limit.
    #[arg(long, value_name = "N", requires = "restart")]
    pub restart_limit: Option<u32>,
    /// Restarts within this time count as consecutive.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "restart")]
    pub restart_within: Option<Duration>,
    /// Whether to restart the agent after a reboot: auto, always or never.
    #[arg(long, value_name = "WHEN", value_parser = recover)]
    pub recover: Option<Recover>,
    /// Start only after another agent of the project is started, ready (the default) or completed; may be repeated.
    #[arg(long, value_name = "AGENT[:STATE]", value_parser = dependency)]
    pub depends_on: Vec<Dependency>,
    /// Ready once a line of the output contains this text.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["ready_command", "ready_reported"])]
    pub ready_output: Option<String>,
    /// Ready once this command succeeds; one line of shell words.
    #[arg(long, value_name = "WORDS", conflicts_with = "ready_reported")]
    pub ready_command: Option<String>,
    /// Ready once the agent calls `fermatactl agent ready`.
    #[arg(long)]
    pub ready_reported: bool,
    /// The start fails when the agent is not ready after this time.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub ready_timeout: Option<Duration>,
    /// Stop the agent after this much run time; paused time does not count.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub time_limit: Option<Duration>,
    /// The agent is stale after this time without a report; 0 disables the check.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub stale_after: Option<Duration>,
    /// What to do with a stale agent: tell or restart.
    #[arg(long, value_name = "ACTION", value_parser = on_stale)]
    pub on_stale: Option<OnStale>,
    /// What to do when output comes faster than it is stored: block or drop.
    #[arg(long, value_name = "POLICY", value_parser = output)]
    pub output_policy: Option<OutputPolicy>,
}

impl SupervisionArgs {
    /// Combines the options with the defaults.
    ///
    /// # Errors
    /// When an option is invalid or conflicts with another one.
    pub fn settings(self) -> Result<Supervision, CommandError> {
        let ready_timeout = self.ready_timeout.map(millis);
        let when = if let Some(text) = self.ready_output {
            if text.is_empty() {
                return Err(CommandError::usage("--ready-output is empty"));
            }
            Some(ReadyWhen::Output(text))
        } else if let Some(line) = self.ready_command {
            let words = split_words(&line).map_err(|e| CommandError::usage(format!("--ready-command: {e}")))?;
            if words.first().is_none_or(String::is_empty) {
                return Err(CommandError::usage("--ready-command names no program"));
            }
            Some(ReadyWhen::Command(words))
        } else {
            self.ready_reported.then_some(ReadyWhen::Reported)
        };
        if when.is_none() && ready_timeout.is_some() {
            return Err(CommandError::usage("--ready-timeout needs a readiness condition")
                .hint("give --ready-output, --ready-command or --ready-reported"));
        }
        if self.time_limit.is_some_and(|limit| limit.is_zero()) {
            return Err(CommandError::usage("--time-limit must be greater than zero"));
        }
        let default = Restart::default();
        let restart = Restart {
            policy: self.restart.unwrap_or_default(),
            delay_ms: self.restart_delay.map_or(default.delay_ms, millis),
            max_delay_ms: self.restart_max_delay.map_or(default.max_delay_ms, millis),
            limit: self.restart_limit.unwrap_or(default.limit),
            within_ms: self.restart_within.map_or(default.within_ms, millis),
        };
        if restart.delay_ms > restart.max_delay_ms {
            return Err(CommandError::usage("--restart-delay is longer than --restart-max-delay"));
        }
        Ok(Supervision {
            restart,
            recover: self.recover.unwrap_or_default(),
            depends_on: self.depends_on,
            ready: when.map(|when| Readiness { when, timeout_ms: ready_timeout }),
            timeout_ms: self.time_limit.map(millis),
            stale_after_ms: self.stale_after.map(millis),
            on_stale: self.on_stale.unwrap_or_default(),
            output: self.output_policy.unwrap_or_default(),
            ..Supervision::default()
        })
    }
}

/// Looks a word up; underscores are accepted for hyphens.
fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    let hyphens = text.replace('_', "-");
    words.iter().find(|(word, _)| *word == hyphens).map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        format!("expected one of {}", words.join(", "))
    })
}

fn restart_policy(text: &str) -> Result<RestartPolicy, String> {
    one_of(text, RESTART_POLICIES)
}

fn recover(text: &str) -> Result<Recover, String> {
    one_of(text, RECOVERIES)
}

fn on_stale(text: &str) -> Result<OnStale, String> {
    one_of(text, STALE_ACTIONS)
}

fn output(text: &str) -> Result<OutputPolicy, String> {
    one_of(text, OUTPUT_POLICIES)
}

fn dependency(text: &str) -> Result<Dependency, String> {
    let (agent, until) = match text.split_once(':') {
        Some((agent, state)) => (agent, one_of(state, DEPENDENCY_STATES)?),
        None => (text, DependencyState::default()),
    };
    let agent = AgentName::new(agent).map_err(|e| e.to_string())?;
    Ok(Dependency { agent, until })
}

pub const RESTART_POLICIES: &[(&str, RestartPolicy)] =
    &[("no", RestartPolicy::No), ("on-failure", RestartPolicy::OnFailure), ("always", RestartPolicy::Always)];

pub const RECOVERIES: &[(&str, Recover)] =
    &[("auto", Recover::Auto), ("always", Recover::Always), ("never", Recover::Never)];

pub const DEPENDENCY_STATES: &[(&str, DependencyState)] = &[
    ("started", DependencyState::Started),
    ("ready", DependencyState::Ready),
    ("completed", DependencyState::Completed),
];

pub const STALE_ACTIONS: &[(&str, OnStale)] = &[("tell", OnStale::Tell), ("restart", OnStale::Restart)];

pub const OUTPUT_POLICIES: &[(&str, OutputPolicy)] = &[("block", OutputPolicy::Block), ("drop", OutputPolicy::Drop)];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, CliCommand};
    use clap::Parser as _;

    fn settings(flags: &[&str]) -> Result<Supervision, String> {
        let line = [&["fermatactl", "run", "-p", "web"], flags, &["--", "true"]].concat();
        let cli = Cli::try_parse_from(line).map_err(|e| e.to_string())?;
        let CliCommand::Run(run) = cli.command else { panic!("not a run") };
        let run = run.into_inner();
        run.supervision.settings().map_err(|error| match error {
            CommandError::Reported(report) => report.message,
            CommandError::OutputClosed => String::new(),
        })
    }

    #[test]
    fn options_become_settings() {
        assert!(settings(&[]).expect("nothing given").is_plain());
        let all = settings(&[
            "--restart",
            "on_failure",
            "--restart-delay",
            "2s",
            "--restart-limit",
            "3",
            "--recover",
            "never",
            "--depends-on",
            "db",
            "--depends-on",
            "migrate:completed",
            "--ready-command",
            "nc -z 'local host' 80",
            "--ready-timeout",
            "5s",
            "--time-limit",
            "1h30m",
            "--stale-after",
            "0",
            "--on-stale",
            "restart",
            "--output-policy",
            "drop",
        ])
        .expect("valid");
        assert_eq!(
            all.restart,
            Restart { policy: RestartPolicy::OnFailure, delay_ms: 2_000, limit: 3, ..Restart::default() }
        );
        assert_eq!((all.recover, all.on_stale, all.output), (Recover::Never, OnStale::Restart, OutputPolicy::Drop));
        let waits: Vec<_> = all.depends_on.iter().map(|d| (d.agent.as_str(), d.until)).collect();
        assert_eq!(waits, [("db", DependencyState::Ready), ("migrate", DependencyState::Completed)]);
        let command = ReadyWhen::Command(["nc", "-z", "local host", "80"].map(str::to_owned).to_vec());
        assert_eq!(all.ready, Some(Readiness { when: command, timeout_ms: Some(5_000) }));
        assert_eq!((all.timeout_ms, all.stale_after_ms), (Some(5_400_000), Some(0)));
    }

    #[test]
    fn invalid_options_are_refused() {
        for (flags, word) in [
            (&["--restart", "sometimes"][..], "on-failure"),
            (&["--restart-delay", "1s"], "--restart"),
            (&["--restart", "always", "--restart-delay", "1h"], "--restart-max-delay"),
            (&["--depends-on", "a b"], "may hold only"),
            (&["--depends-on", "db:healthy"], "started, ready, completed"),
            (&["--ready-reported", "--ready-output", "x"], "cannot be used with"),
            (&["--ready-timeout", "1s"], "needs a readiness condition"),
            (&["--ready-command", ""], "names no program"),
            (&["--time-limit", "0s"], "greater than zero"),
        ] {
            let message = settings(flags).expect_err("invalid");
            assert!(message.contains(word), "{flags:?}: {message}");
        }
    }
}
