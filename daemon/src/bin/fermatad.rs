//! `fermatad`: the supervisor. Reads the command line, sets the log up, runs the daemon.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use fermata_daemon::config::{Overrides, Paths, Settings};
use fermata_daemon::server::{self, ALREADY_RUNNING, LogHandle, Options, StartError};
use fermata_os::memory;
use fermata_protocol::error_chain;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, reload};

/// Keeps AI agents and other long-running processes running, holds them, and brings them back.
#[derive(Debug, Parser)]
#[command(name = "fermatad", version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, env = "FERMATA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where database, checkpoints and logs lie.
    #[arg(long, env = "FERMATA_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where sockets lie.
    #[arg(long, env = "FERMATA_RUNTIME_DIR", value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// The control socket.
    #[arg(long, env = "FERMATA_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Where plugins lie.
    #[arg(long, env = "FERMATA_PLUGIN_DIR", value_name = "DIR")]
    plugin_dir: Option<PathBuf>,
    /// Leaves operations that a crash has left unfinished as they are.
    #[arg(long)]
    no_recover: bool,
    /// Leaves the session of whoever started it; used when a command starts the daemon.
    #[arg(long)]
    background: bool,
}

fn main() -> ExitCode {
    memory::share_arenas();
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fermatad: failed to {}", error_chain(&error));
            match error {
                StartError::AlreadyRunning { .. } => ExitCode::from(u8::try_from(ALREADY_RUNNING).unwrap_or(1)),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), StartError> {
    let absolute = |path: &Option<PathBuf>| path.as_ref().map(|path| std::path::absolute(path).unwrap_or(path.clone()));
    let overrides = Overrides {
        config: absolute(&arguments.config),
        state_dir: absolute(&arguments.state_dir),
        runtime_dir: absolute(&arguments.runtime_dir),
        socket: absolute(&arguments.socket),
        plugin_dir: absolute(&arguments.plugin_dir),
    };
    let paths = Paths::find(nix::unistd::geteuid().is_root(), &overrides)?;
    let settings = Settings::read(&paths)?;
    if arguments.background {
        // A group leader cannot leave its session; it goes on in the one it has.
        if let Err(errno) = nix::unistd::setsid() {
            eprintln!("fermatad: stays in the session of whoever started it: {errno}");
        }
    }
    drop(std::env::set_current_dir("/"));
    let log = start_log(&settings);
    let skip = std::env::var_os("FERMATA_SKIP_RECOVERY").is_some_and(|value| value != "0" && !value.is_empty());
    let options = Options { paths, recover: !arguments.no_recover && !skip };
    // A workspace may be as deep as a path is long, and work follows it down; only what is used takes memory.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_stack_size(32 << 20)
        .worker_threads(1)
        // Queries, snapshots, token counts: more at once would only wait for the disk.
        .max_blocking_threads(32)
        .enable_all()
        .build()
        .map_err(StartError::Signals)?;
    runtime.block_on(server::run(options, settings, log))
}

/// Logs to the journal under systemd, else to standard error.
fn start_log(settings: &Settings) -> LogHandle {
    let (filter, handle) = reload::Layer::new(server::log_filter(&settings.log));
    let under_systemd = std::env::var_os("JOURNAL_STREAM").is_some();
    let journal = under_systemd.then(tracing_journald::layer).and_then(Result::ok);
    let stderr = journal.is_none().then(|| {
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).boxed()
    });
    tracing_subscriber::registry().with(filter).with(journal).with(stderr).init();
    handle
}
