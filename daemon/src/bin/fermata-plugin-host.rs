//! `fermata-plugin-host`: runs one plugin for the daemon; see `fermata_daemon::plugins::host`.

use clap::Parser;
use fermata_daemon::plugins::host;
use std::process::ExitCode;

fn main() -> ExitCode {
    host::run(&host::HostArguments::parse())
}
