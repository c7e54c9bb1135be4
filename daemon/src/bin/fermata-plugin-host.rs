//! `fermata-plugin-host`: runs one plugin for `fermatad`, which starts it.

use std::process::ExitCode;

use clap::Parser as _;
use fermata_daemon::plugins::host::{self, HostArguments};

fn main() -> ExitCode {
    host::run(&HostArguments::parse())
}
