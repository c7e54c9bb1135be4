//! How an agent is looked after, as flags of `run`: the same settings as in a `fermata.toml`.

use std::time::Duration;

use clap::Args;
use fermata_protocol::AgentName;
use fermata_protocol::supervision::{
    Dependency, DependencyState, OnStale, OutputPolicy, Readiness, ReadyWhen, Recover, Restart, RestartPolicy,
    Supervision,
};

use super::values::split_words;
use crate::errors::Failure;
use crate::units::{millis, parse_duration};

/// When an agent is started, started again, given up.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Supervision")]
pub struct SupervisionArgs {
    /// When it is started again: no, on-failure or always.
    #[arg(long, value_name = "WHEN", value_parser = restart_policy)]
    pub restart: Option<RestartPolicy>,
    /// The wait before the first restart; it doubles with each one in a row.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "restart")]
    pub restart_delay: Option<Duration>,
    /// The longest wait before a restart.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "restart")]
    pub restart_max_delay: Option<Duration>,
    /// So many restarts in a row are tried; 0 for no limit.
    #[arg(long, value_name = "N", requires = "restart")]
    pub restart_limit: Option<u32>,
    /// The time in which restarts count as in a row.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "restart")]
    pub restart_within: Option<Duration>,
    /// Whether it is brought back after a reboot: auto, always or never.
    #[arg(long, value_name = "WHEN", value_parser = recover)]
    pub recover: Option<Recover>,
    /// An agent of the project that has to be started, ready (the default) or completed first; may
    /// be given several times.
    #[arg(long, value_name = "AGENT[:STATE]", value_parser = dependency)]
    pub depends_on: Vec<Dependency>,
    /// It is ready once a line of its output holds this text.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["ready_command", "ready_reported"])]
    pub ready_output: Option<String>,
    /// It is ready once this command, one line of shell words, succeeds.
    #[arg(long, value_name = "WORDS", conflicts_with = "ready_reported")]
    pub ready_command: Option<String>,
    /// It is ready once it says so.
    #[arg(long)]
    pub ready_reported: bool,
    /// How long it may take to be ready; longer is a failed start.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub ready_timeout: Option<Duration>,
    /// How long it may run, paused time not counted.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub time_limit: Option<Duration>,
    /// After how long without a report it is stale; 0 for never.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub stale_after: Option<Duration>,
    /// What is done when it is stale: tell or restart.
    #[arg(long, value_name = "ACTION", value_parser = on_stale)]
    pub on_stale: Option<OnStale>,
    /// What becomes of output that comes too fast: block or drop.
    #[arg(long, value_name = "POLICY", value_parser = output)]
    pub output_policy: Option<OutputPolicy>,
}

impl SupervisionArgs {
    /// Lays the flags over the defaults.
    ///
    /// # Errors
    /// When a flag makes no sense.
    pub fn settings(self) -> Result<Supervision, Failure> {
        let ready_timeout = self.ready_timeout.map(millis);
        let when = if let Some(text) = self.ready_output {
            if text.is_empty() {
                return Err(Failure::usage("--ready-output is empty"));
            }
            Some(ReadyWhen::Output(text))
        } else if let Some(line) = self.ready_command {
            let words = split_words(&line).map_err(|e| Failure::usage(format!("--ready-command: {e}")))?;
            if words.first().is_none_or(String::is_empty) {
                return Err(Failure::usage("--ready-command names no program"));
            }
            Some(ReadyWhen::Command(words))
        } else {
            self.ready_reported.then_some(ReadyWhen::Reported)
        };
        if when.is_none() && ready_timeout.is_some() {
            return Err(Failure::usage("--ready-timeout goes with a condition")
                .hint("give --ready-output, --ready-command or --ready-reported"));
        }
        if self.time_limit.is_some_and(|limit| limit.is_zero()) {
            return Err(Failure::usage("--time-limit must be more than nothing"));
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
            return Err(Failure::usage("--restart-delay is longer than the longest wait (--restart-max-delay)"));
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

/// Finds a word in a list; underscores pass for hyphens.
fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    let hyphens = text.replace('_', "-");
    words.iter().find(|(word, _)| *word == hyphens).map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        format!("it is one of {}", words.join(", "))
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

/// When an agent is started again, in words.
pub const RESTART_POLICIES: &[(&str, RestartPolicy)] =
    &[("no", RestartPolicy::No), ("on-failure", RestartPolicy::OnFailure), ("always", RestartPolicy::Always)];

/// Whether an agent is brought back, in words.
pub const RECOVERIES: &[(&str, Recover)] =
    &[("auto", Recover::Auto), ("always", Recover::Always), ("never", Recover::Never)];

/// How far a dependency has to have come, in words.
pub const DEPENDENCY_STATES: &[(&str, DependencyState)] = &[
    ("started", DependencyState::Started),
    ("ready", DependencyState::Ready),
    ("completed", DependencyState::Completed),
];

/// What is done about a stale agent, in words.
pub const STALE_ACTIONS: &[(&str, OnStale)] = &[("tell", OnStale::Tell), ("restart", OnStale::Restart)];

/// What becomes of output that comes too fast, in words.
pub const OUTPUT_POLICIES: &[(&str, OutputPolicy)] = &[("block", OutputPolicy::Block), ("drop", OutputPolicy::Drop)];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser as _;

    fn settings(flags: &[&str]) -> Result<Supervision, String> {
        let line = [&["fermatactl", "run", "-p", "web"], flags, &["--", "true"]].concat();
        let cli = Cli::try_parse_from(line).map_err(|e| e.to_string())?;
        let Command::Run(run) = cli.command else { panic!("it is a run") };
        let run = run.into_inner();
        run.supervision.settings().map_err(|failure| match failure {
            Failure::Said(report) => report.message,
            Failure::ReaderGone => String::new(),
        })
    }

    #[test]
    fn flags_become_settings() {
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
    fn flags_that_make_no_sense_are_refused() {
        for (flags, word) in [
            (&["--restart", "sometimes"][..], "on-failure"),
            (&["--restart-delay", "1s"], "--restart"),
            (&["--restart", "always", "--restart-delay", "1h"], "longest wait"),
            (&["--depends-on", "a b"], "may hold only"),
            (&["--depends-on", "db:healthy"], "started, ready, completed"),
            (&["--ready-reported", "--ready-output", "x"], "cannot be used with"),
            (&["--ready-timeout", "1s"], "goes with a condition"),
            (&["--ready-command", ""], "names no program"),
            (&["--time-limit", "0s"], "more than nothing"),
        ] {
            let said = settings(flags).expect_err("it makes no sense");
            assert!(said.contains(word), "{flags:?}: {said}");
        }
    }
}
