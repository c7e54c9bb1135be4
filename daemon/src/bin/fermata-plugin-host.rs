//! Runs one plugin on the daemon's behalf; everything is in `fermata_daemon::plugins::host`.

use clap::Parser;
use fermata_daemon::plugins::host;
use std::process::ExitCode;

fn main() -> ExitCode {
    host::run(&host::HostArguments::parse())
}
