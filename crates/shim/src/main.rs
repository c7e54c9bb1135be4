//! `fermata-shim RUN_DIR`: starts the agent described by RUN_DIR/launch.json and supervises it.
//!
//! Only for the daemon. Prints one line of JSON and exits; the shim itself continues in the background.

use std::path::PathBuf;
use std::process::exit;

fn main() {
    // The daemon blocks the signals that it waits for.
    if let Err(error) = fermata_os::signals::unblock_all() {
        eprintln!("fermata-shim: failed to unblock signals: {error}");
    }
    let mut args = std::env::args_os().skip(1);
    match (args.next(), args.next()) {
        (Some(run_dir), None) => exit(fermata_shim::launcher::main(&PathBuf::from(run_dir))),
        _ => {
            eprintln!("usage: fermata-shim RUN_DIR (started by fermatad, not by hand)");
            exit(2);
        }
    }
}
