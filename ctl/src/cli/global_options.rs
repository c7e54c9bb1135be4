//! The options that every command takes, from the command line and the environment.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::output::{ColorChoice, Format};
use crate::units::parse_duration;

/// The options that every command takes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalOptions {
    /// Print JSON: one object, or one line per row of a list.
    #[arg(long, global = true, conflicts_with = "quiet")]
    pub json: bool,
    /// Print ids only.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// The daemon's socket [env: FERMATA_SOCKET].
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Do not start a daemon if none is running.
    #[arg(long, global = true)]
    pub no_autostart: bool,
    /// The state directory of a daemon that this command starts [env: FERMATA_STATE_DIR].
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The directory of the daemon's socket [env: FERMATA_RUNTIME_DIR].
    #[arg(long, global = true, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// When to use colours.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: ColorChoice,
    /// Give up after this time with exit code 6, for example 500ms, 10s or 2m.
    #[arg(long, global = true, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

impl GlobalOptions {
    /// Fills options that were not given from the environment; an empty variable counts as unset.
    ///
    /// `--runtime-dir` overrides `FERMATA_SOCKET`: an option overrides every variable.
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

    /// Returns the output format that `--json` and `--quiet` select.
    pub fn format(&self) -> Format {
        if self.json {
            Format::Json
        } else if self.quiet {
            Format::Ids
        } else {
            Format::Human
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_override_the_environment() {
        let variable = |name: &str| match name {
            "FERMATA_SOCKET" => Some(OsString::from("/env.sock")),
            "FERMATA_STATE_DIR" => Some(OsString::new()),
            _ => None,
        };
        let globals = GlobalOptions::default().with_environment(variable);
        assert_eq!(globals.socket, Some("/env.sock".into()));
        assert_eq!(globals.state_dir, None);
        let typed = GlobalOptions { runtime_dir: Some("/typed".into()), ..GlobalOptions::default() };
        assert_eq!(typed.with_environment(variable).socket, None);
    }
}
