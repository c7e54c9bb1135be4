//! `fermatad`: the supervisor. Parses the command line, sets up the log, runs the daemon.

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

/// Supervises AI agents and other long-running processes: freezes, checkpoints and resumes them.
#[derive(Debug, Parser)]
#[command(name = "fermatad", version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, env = "FERMATA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// The directory of database, checkpoints and logs.
    #[arg(long, env = "FERMATA_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The directory of sockets.
    #[arg(long, env = "FERMATA_RUNTIME_DIR", value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// The control socket.
    #[arg(long, env = "FERMATA_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,
    /// The directory of plugins.
    #[arg(long, env = "FERMATA_PLUGIN_DIR", value_name = "DIR")]
    plugin_dir: Option<PathBuf>,
    /// Do not recover operations that a crash has interrupted.
    #[arg(long)]
    no_recover: bool,
    /// Run in a new session; used when a command starts the daemon.
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
                StartError::Lock(_)
                | StartError::Directory { .. }
                | StartError::Config(_)
                | StartError::Profile(_)
                | StartError::Store(_)
                | StartError::Plugins(_)
                | StartError::Recovery(_)
                | StartError::Bind(_)
                | StartError::ProgramMissing { .. }
                | StartError::BootId(_)
                | StartError::Signals(_)
                | StartError::Runtime(_) => ExitCode::FAILURE,
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
        // Fails for the leader of a process group, which stays in its session.
        if let Err(errno) = nix::unistd::setsid() {
            eprintln!("fermatad: stays in the session of the process that started it: {errno}");
        }
    }
    drop(std::env::set_current_dir("/"));
    let signals = server::block_signals().map_err(StartError::Signals)?;
    let log = start_log(&settings);
    let skip = std::env::var_os("FERMATA_SKIP_RECOVERY").is_some_and(|value| value != "0" && !value.is_empty());
    let options = Options { paths, recover: !arguments.no_recover && !skip, signals };
    // Work on a workspace recurses as deep as a path can be. Only the used part of a stack takes memory.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_stack_size(32 << 20)
        .worker_threads(1)
        // For queries, snapshots and token counts; more threads would only wait for the disk.
        .max_blocking_threads(32)
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
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
