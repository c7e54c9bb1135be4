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
mod errors;
mod keys;
mod output;
mod raw_terminal;
mod session;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::Cli;
use crate::errors::Failure;
use crate::session::Session;

fn main() -> ExitCode {
    let Cli { globals, command } = Cli::parse();
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
