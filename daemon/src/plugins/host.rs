//! The program `fermata-plugin-host`: one process, one plugin, frames on descriptor 3.
//!
//! ```text
//!   main thread    reads frames; queues calls, carries out cancellations; ends the process at EOF
//!   caller thread  loads the plugin, owns the instance, makes one call after another
//!   memory thread  ends the process when the plugin exceeds its memory limit
//! ```
//!
//! It ends when descriptor 3 closes, at any time, and kills the processes of its session, which the plugin may have
//! started.

use super::frame::{self, FrameError, FromHost, ToHost};
use super::{config, loader};
use fermata_os::socket_child;
use fermata_plugin_api::host::{HostServices, Instance};
use fermata_plugin_api::{CallError, Description, LogLevel, abi};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpid, getsid};
use serde_json::Value;
use serde_json::value::RawValue;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Duration;

/// How long a running call and the plugin's `destroy` may take together once descriptor 3 is closed.
const END_TIMEOUT: Duration = Duration::from_millis(1500);

/// How often the memory in use is read. A process can fill a few hundred MiB in this time.
const MEMORY_PERIOD: Duration = Duration::from_millis(250);

/// The command line of the host.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "fermata-plugin-host", about = "Runs one Fermata plugin", version)]
pub struct HostArguments {
    /// The plugin's shared object.
    #[arg(long)]
    pub plugin: PathBuf,
    /// TOML file whose table `settings` goes to the plugin.
    #[arg(long)]
    pub settings_file: Option<PathBuf>,
    /// Loads and describes the plugin, makes no instance, and exits.
    #[arg(long)]
    pub describe_only: bool,
    /// Ends the process when it has more than this resident (0: no limit).
    #[arg(long, default_value_t = 0)]
    pub memory_limit_bytes: u64,
}

/// Runs the host until descriptor 3 closes.
pub fn run(arguments: &HostArguments) -> ExitCode {
    let stream = match socket_child::inherited_fd3() {
        Ok(stream) => stream,
        Err(error) => {
            eprintln!("descriptor 3 is not a socket: this program is started by fermatad only ({error})");
            return ExitCode::from(2);
        }
    };
    // Artifacts may contain secrets.
    umask(Mode::from_bits_truncate(0o077));
    prefer_as_oom_victim();
    match serve(arguments, stream) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the connection to the daemon failed: {}", fermata_protocol::error_chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &HostArguments, mut stream: UnixStream) -> Result<(), FrameError> {
    let shared = Arc::new(HostShared {
        writer: Mutex::new(stream.try_clone()?),
        instance: OnceLock::new(),
        current: AtomicU64::new(0),
        cancelled_up_to: AtomicU64::new(0),
    });
    watch_memory(arguments.memory_limit_bytes, &shared)?;
    let (calls, queue) = channel();
    let (ended_sender, ended) = channel();
    let caller = CallerThread { arguments: arguments.clone(), shared: Arc::clone(&shared) };
    thread::Builder::new().name("caller".into()).spawn(move || caller.run(&queue, &ended_sender))?;
    let result = read(&mut stream, &shared, &calls);
    // The caller thread destroys the instance at the end of its queue.
    shared.cancelled_up_to.store(u64::MAX, Ordering::SeqCst);
    drop(calls);
    end_plugin(&shared, &ended);
    result
}

/// Loads and describes the plugin and, unless it is only to be described, creates an instance.
fn open(
    arguments: &HostArguments,
    shared: &Arc<HostShared>,
) -> Result<(Description, Option<Arc<Instance>>), CallError> {
    let settings = match &arguments.settings_file {
        Some(path) => config::read_plugin_file(path)
            .and_then(|file| file.settings_json(path))
            .map_err(|error| CallError::new("bad_settings_file", fermata_protocol::error_chain(&error)))?,
        None => Value::Object(serde_json::Map::new()),
    };
    let table = loader::load(&arguments.plugin)?;
    let describe = table.describe()?;
    if arguments.describe_only {
        return Ok((describe, None));
    }
    let services: Arc<dyn HostServices> = Arc::clone(shared) as Arc<dyn HostServices>;
    let instance = table.create(&settings, services)?;
    Ok((describe, Some(Arc::new(instance))))
}

/// Reads frames until the daemon closes the connection.
fn read(stream: &mut UnixStream, shared: &HostShared, calls: &Sender<HostCall>) -> Result<(), FrameError> {
    while let Some(frame) = frame::read_frame::<ToHost>(stream)? {
        match frame {
            ToHost::Call { id, method, params, deadline_ms } => {
                let call = HostCall { id, method, params: with_deadline(params, deadline_ms) };
                // Fails when the plugin was refused: its caller thread has ended, and the daemon closes the connection.
                calls.send(call).ok();
            }
            ToHost::Cancel { id } => {
                shared.cancelled_up_to.fetch_max(id, Ordering::SeqCst);
                // No later call can begin meanwhile, since its frame is read by this thread.
                if shared.current.load(Ordering::SeqCst) == id {
                    shared.cancel_plugin();
                }
            }
        }
    }
    Ok(())
}

/// Adds the deadline to the plugin's request.
fn with_deadline(mut params: Value, deadline_ms: u64) -> Value {
    if let Value::Object(members) = &mut params {
        members.insert("deadline_ms".into(), deadline_ms.into());
    }
    params
}

/// Cancels the plugin and waits for the caller thread, kills the session's other processes, and sees that this process
/// exits.
fn end_plugin(shared: &Arc<HostShared>, ended: &Receiver<()>) {
    // On a thread of its own: `cancel` is the plugin's code and may hang.
    let cancelling = Arc::clone(shared);
    let canceller = thread::Builder::new().spawn(move || cancelling.cancel_plugin());
    let in_time = canceller.is_ok() && ended.recv_timeout(END_TIMEOUT) != Err(RecvTimeoutError::Timeout);
    let own_pid = getpid();
    if getsid(None) == Ok(own_pid) {
        socket_child::kill_session(std::process::id());
    }
    // Exit handlers may be the plugin's code too, and may hang.
    let guard = thread::Builder::new().spawn(move || {
        thread::sleep(END_TIMEOUT);
        kill(own_pid, Signal::SIGKILL).ok();
    });
    if !in_time || guard.is_err() {
        eprintln!("the plugin did not end in time");
        kill(own_pid, Signal::SIGKILL).ok();
    }
}

/// One call, on its way to the caller thread.
struct HostCall {
    id: u64,
    method: String,
    params: Value,
}

/// The thread that owns the instance.
struct CallerThread {
    arguments: HostArguments,
    shared: Arc<HostShared>,
}

impl CallerThread {
    fn run(self, queue: &Receiver<HostCall>, ended: &Sender<()>) {
        match open(&self.arguments, &self.shared) {
            Ok((describe, instance)) => {
                if let Some(instance) = &instance {
                    // Set only here, so that it cannot fail.
                    self.shared.instance.set(Arc::downgrade(instance)).ok();
                }
                let hello = FromHost::Hello { abi: abi::VERSION, describe };
                // An error means that the connection is closed, which the main thread detects too.
                if self.shared.send(&hello).is_ok()
                    && let Some(instance) = instance
                {
                    self.answer_all(&instance, queue);
                }
            }
            Err(error) => {
                let error = bounded(error);
                self.shared.send(&FromHost::Refused { error }).ok();
            }
        }
        // Fails when the main thread no longer waits: the process is ending.
        ended.send(()).ok();
    }

    fn answer_all(&self, instance: &Instance, queue: &Receiver<HostCall>) {
        for call in queue {
            let reply = self.answer(instance, &call);
            if self.shared.send(&reply).is_err() {
                return;
            }
        }
    }

    fn answer(&self, instance: &Instance, call: &HostCall) -> FromHost {
        let id = call.id;
        self.shared.current.store(id, Ordering::SeqCst);
        let result = if self.shared.cancelled() {
            Err(CallError::cancelled())
        } else {
            instance.call(&call.method, call.params.to_string().as_bytes())
        };
        self.shared.current.store(0, Ordering::SeqCst);
        match result.and_then(raw) {
            Ok(ok) => FromHost::Reply { id, ok: Some(ok), error: None },
            Err(error) => FromHost::Reply { id, ok: None, error: Some(bounded(error)) },
        }
    }
}

/// Shortens the texts of a failure, which come from the plugin, so that it fits into a frame.
fn bounded(failure: CallError) -> CallError {
    CallError {
        code: super::output::shortened(&failure.code),
        message: super::output::shortened(&failure.message),
        hint: failure.hint.as_deref().map(super::output::shortened),
    }
}

/// Checks that a plugin's reply is JSON, without building a tree; an empty reply is `null`.
fn raw(bytes: Vec<u8>) -> Result<Box<RawValue>, CallError> {
    if bytes.is_empty() {
        return Ok(RawValue::NULL.to_owned());
    }
    let invalid =
        |error: &dyn std::fmt::Display| CallError::new("bad_reply", format!("the plugin's reply is not JSON: {error}"));
    let text = String::from_utf8(bytes).map_err(|error| invalid(&error))?;
    RawValue::from_string(text).map_err(|error| invalid(&error))
}

/// The state that the threads share, and the services of the host for the plugin.
struct HostShared {
    writer: Mutex<UnixStream>,
    /// Set once the instance exists; the caller thread owns it.
    instance: OnceLock<Weak<Instance>>,
    /// Id of the running call, or 0.
    current: AtomicU64,
    /// All calls up to this id are cancelled.
    cancelled_up_to: AtomicU64,
}

impl HostShared {
    fn send(&self, frame: &FromHost) -> Result<(), FrameError> {
        // After a panic of another writer the stream may end within a frame; the daemon then ends the connection.
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        frame::write_frame(&mut *writer, frame)
    }

    fn cancel_plugin(&self) {
        if let Some(instance) = self.instance.get().and_then(Weak::upgrade) {
            instance.cancel();
        }
    }
}

impl HostServices for HostShared {
    fn log(&self, level: LogLevel, message: &str) {
        let level = match level {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
        };
        let frame = FromHost::Log { level: level.to_owned(), message: super::output::shortened(message) };
        // A line that cannot be sent is lost.
        self.send(&frame).ok();
    }

    fn cancelled(&self) -> bool {
        let up_to = self.cancelled_up_to.load(Ordering::SeqCst);
        match self.current.load(Ordering::SeqCst) {
            // Between two calls only the end of the host cancels.
            0 => up_to == u64::MAX,
            id => up_to >= id,
        }
    }
}

/// Asks the kernel to kill this process before others when memory runs out.
fn prefer_as_oom_victim() {
    // A process may always raise its own score. An error is ignored, since the memory thread still enforces the limit.
    std::fs::write("/proc/self/oom_score_adj", "1000").ok();
}

/// Starts the thread that ends this process when it has more than `limit` bytes resident.
///
/// Not done by a resource limit, which the programs that a plugin runs would inherit.
fn watch_memory(limit: u64, shared: &Arc<HostShared>) -> io::Result<()> {
    if limit == 0 {
        return Ok(());
    }
    let shared = Arc::clone(shared);
    let watch = move || {
        loop {
            thread::sleep(MEMORY_PERIOD);
            let resident = resident_bytes().unwrap_or(0);
            if resident > limit {
                let error = CallError::new(
                    "memory_limit",
                    format!("the plugin used {resident} bytes of memory, the limit is {limit}"),
                );
                // The frame is sent by another thread, which may block: the process ends after a period in any case.
                let dying = FromHost::Dying { error };
                thread::spawn({
                    let shared = Arc::clone(&shared);
                    move || {
                        shared.send(&dying).ok();
                        kill(Pid::this(), Signal::SIGKILL).ok();
                    }
                });
                thread::sleep(MEMORY_PERIOD);
                kill(Pid::this(), Signal::SIGKILL).ok();
            }
        }
    };
    thread::Builder::new().name("memory".into()).spawn(watch)?;
    Ok(())
}

/// Reads the resident set of this process: the second field of `/proc/self/statm`, in pages.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}
