//! fermatactl, the command line of Fermata: parses the arguments, runs one command, exits with its code.
//!
//! Results go to stdout, messages to stderr. All decisions are made by the daemon; this program sends requests and
//! shows the results.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

mod agent_environment;
mod autostart;
mod cli;
mod commands;
mod connect;
#[cfg_attr(
    not(test),
    expect(
        clippy::wildcard_enum_match_arm,
        reason = "a key names the kinds of values that it takes and refuses all others"
    )
)]
mod declaration;
mod errors;
mod keys;
mod output;
mod paths;
mod raw_terminal;
mod session;
mod terminal_text;
mod units;

use std::mem::ManuallyDrop;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

use crate::cli::{Cli, deferred};
use crate::errors::CommandError;
use crate::session::DaemonSession;

/// Parses the command line; exits with a message when it is invalid.
fn parse_arguments() -> Cli {
    let needs_all = ["help", "--help", "-h", "completions"];
    if std::env::args_os().skip(1).any(|word| needs_all.iter().any(|one| word == *one)) {
        deferred::declare_all();
    }
    // Never dropped: freeing it piece by piece takes a third as long as building it, and the process exits soon.
    let mut command = ManuallyDrop::new(Cli::command());
    let mut matches = command.try_get_matches_from_mut(std::env::args_os()).unwrap_or_else(|error| error.exit());
    Cli::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.format(&mut command).exit())
}

fn main() -> ExitCode {
    let Cli { globals, command } = parse_arguments();
    let json = globals.json;
    let mut session = DaemonSession::new(globals.with_environment(connect::process_variable));
    let result = commands::run(&mut session, command);
    // Rows that were written before an error are valid.
    let flushed = session.out.flush().map_err(CommandError::from);
    match result.and_then(|code| flushed.map(|()| code)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            error.print(json);
            ExitCode::from(error.exit_number())
        }
    }
}
