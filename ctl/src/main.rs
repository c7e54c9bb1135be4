//! fermatactl, the command line of Fermata: reads the command line, runs one command, exits with its code.
//!
//! Data goes to stdout, messages to stderr. Everything that is decided is decided by the daemon;
//! this program only asks and shows.
#![forbid(unsafe_code)]

mod autostart;
mod cli;
mod commands;
mod connect;
mod deadline;
mod declaration;
mod errors;
mod keys;
mod output;
mod raw_terminal;
mod session;
mod units;

use std::mem::ManuallyDrop;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

use crate::cli::{Cli, deferred};
use crate::errors::Failure;
use crate::session::Session;

/// Understands the command line, or explains what is wrong with it and exits.
fn typed() -> Cli {
    let all = ["help", "--help", "-h", "completions"];
    if std::env::args_os().skip(1).any(|word| all.iter().any(|one| word == *one)) {
        deferred::describe_all();
    }
    // To free the description, piece by piece, takes a third as long as to make it; the process ends soon.
    let mut described = ManuallyDrop::new(Cli::command());
    let mut matches = described.try_get_matches_from_mut(std::env::args_os()).unwrap_or_else(|error| error.exit());
    Cli::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.format(&mut described).exit())
}

fn main() -> ExitCode {
    let Cli { globals, command } = typed();
    let json = globals.json;
    let mut session = Session::new(globals.with_environment(connect::process_variable));
    let ended = commands::run(&mut session, command);
    // Rows that were written before a failure are still true.
    let flushed = session.out.flush().map_err(Failure::from);
    match ended.and_then(|code| flushed.map(|()| code)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.print(json);
            ExitCode::from(failure.exit_number())
        }
    }
}
