//! Runs one program until it exits, is cancelled or times out.
//!
//! ```text
//!   calling thread   spawns the program, waits for the first of: exit, cancellation, timeout;
//!                    then kills its process group, reaps it and returns the result
//!   stdin thread     writes the request to stdin
//!   stderr thread    keeps the beginning of stderr, discards the rest
//!   wait thread      waits for the exit without reaping
//! ```
//!
//! The program is reaped last, so that its process group id cannot be reused before the group is killed. Its stdout is
//! that of the host, which goes to the log of the daemon.

use fermata_plugin_api::{CallError, Host};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How many bytes of stderr are kept.
const STDERR_BYTES: usize = 4096;
/// How many lines of stderr an error message shows.
const STDERR_LINES: usize = 5;
/// How long to wait for the end of stderr after the exit: a process outside the group may hold it open.
const STDERR_TIMEOUT: Duration = Duration::from_millis(200);

/// A program to run.
pub struct Invocation<'a> {
    /// The program and its arguments; not empty.
    pub argv: &'a [String],
    /// The working directory; that of the host when `None`.
    pub directory: Option<&'a Path>,
    /// The bytes for stdin.
    pub input: Vec<u8>,
    /// Variables in addition to those of the host.
    pub environment: Vec<(&'static str, &'a OsStr)>,
    /// The time limit.
    pub limit: Duration,
}

/// Why the wait for a program ended.
enum WaitEvent {
    Exited,
    Cancelled,
}

/// Cancels the current program from another thread.
#[derive(Default)]
pub struct Canceller {
    running: Mutex<Option<Sender<WaitEvent>>>,
}

impl Canceller {
    /// Does nothing when no program is running.
    pub fn cancel(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = &*running {
            // Fails when the program has just ended.
            sender.send(WaitEvent::Cancelled).ok();
        }
    }

    fn set(&self, sender: Option<Sender<WaitEvent>>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = sender;
    }
}

impl Invocation<'_> {
    /// Runs the program. The error of a failed program contains the first lines of its stderr.
    pub fn run(self, canceller: &Canceller, host: &Host) -> Result<(), CallError> {
        let name = self.argv[0].clone();
        let limit = self.limit;
        let until = Instant::now() + limit;
        let (sender, events) = channel();
        canceller.set(Some(sender.clone()));
        // Covers a cancellation that came before the sender was set.
        let result = if host.cancelled() {
            Err(CallError::cancelled())
        } else {
            self.spawn().and_then(|running| running.wait(&name, sender, &events, until, limit))
        };
        canceller.set(None);
        result
    }

    fn spawn(self) -> Result<Running, CallError> {
        let name = &self.argv[0];
        let failed =
            |what: &str, error: std::io::Error| CallError::new("not_started", format!("{name} {what}: {error}"));
        let mut command = Command::new(name);
        command
            .args(&self.argv[1..])
            .envs(self.environment.iter().copied())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(directory) = self.directory {
            command.current_dir(directory);
        }
        let child = command.spawn().map_err(|e| failed("cannot be started", e))?;
        let mut running = Running { child, stderr: channel().1 };
        if let Some(mut stdin) = running.child.stdin.take() {
            let input = self.input;
            // Fails when the program does not read its input, which is not an error.
            thread::Builder::new()
                .spawn(move || stdin.write_all(&input))
                .map_err(|e| failed("cannot be given its input", e))?;
        }
        if let Some(stderr) = running.child.stderr.take() {
            let (text, receiver) = channel();
            running.stderr = receiver;
            thread::Builder::new()
                .spawn(move || text.send(beginning(stderr)))
                .map_err(|e| failed("cannot be read", e))?;
        }
        Ok(running)
    }
}

/// A started program; dropping it kills and reaps it.
struct Running {
    child: Child,
    stderr: Receiver<String>,
}

impl Running {
    fn wait(
        mut self,
        name: &str,
        sender: Sender<WaitEvent>,
        events: &Receiver<WaitEvent>,
        until: Instant,
        limit: Duration,
    ) -> Result<(), CallError> {
        let pid = self.pid();
        thread::Builder::new()
            .spawn(move || {
                let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
                while waitid(Id::Pid(pid), flags) == Err(nix::errno::Errno::EINTR) {}
                // Fails when the caller has timed out.
                sender.send(WaitEvent::Exited).ok();
            })
            .map_err(|error| CallError::new("not_watched", error.to_string()))?;
        let timeout = until.saturating_duration_since(Instant::now());
        let error = match events.recv_timeout(timeout) {
            Ok(WaitEvent::Exited) => None,
            Ok(WaitEvent::Cancelled) | Err(RecvTimeoutError::Disconnected) => Some(CallError::cancelled()),
            Err(RecvTimeoutError::Timeout) => {
                Some(CallError::new("timeout", format!("{name} exceeded its time limit of {limit:?}")))
            }
        };
        let status = self.terminate();
        match (error, status) {
            (Some(error), _) => Err(error),
            (None, Ok(status)) if status.success() => Ok(()),
            (None, Ok(status)) => Err(self.explain(name, status)),
            (None, Err(error)) => Err(CallError::new("not_watched", error.to_string())),
        }
    }

    fn pid(&self) -> Pid {
        // Linux's process ids fit into an i32.
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Kills the process group, then reaps the program.
    fn terminate(&mut self) -> std::io::Result<ExitStatus> {
        // The program is not reaped yet, so the group id is still its own. A group of only a zombie is not an error.
        killpg(self.pid(), Signal::SIGKILL).ok();
        self.child.wait()
    }

    fn explain(&self, name: &str, status: ExitStatus) -> CallError {
        let ended = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exited with code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended with an unknown status".to_owned(),
        };
        let stderr = self.stderr.recv_timeout(STDERR_TIMEOUT).unwrap_or_default();
        let lines: Vec<&str> =
            stderr.lines().map(str::trim_end).filter(|line| !line.is_empty()).take(STDERR_LINES).collect();
        let message = match lines.is_empty() {
            true => format!("{name} {ended}"),
            false => format!("{name} {ended}: {}", lines.join("; ")),
        };
        CallError::new("program_failed", message)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // `try_wait` returns a status after `terminate`; then the group must not be killed again.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.terminate().ok();
        }
    }
}

/// Reads a stream to its end and returns the first bytes.
fn beginning(mut stream: impl Read) -> String {
    let mut kept = Vec::new();
    let mut chunk = [0; 4096];
    // An error counts as the end.
    while let Ok(count @ 1..) = stream.read(&mut chunk) {
        let room = STDERR_BYTES - kept.len();
        kept.extend_from_slice(&chunk[..count.min(room)]);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, limit: Duration, canceller: &Canceller) -> Result<(), CallError> {
        let argv = ["sh", "-c", script].map(str::to_owned);
        let program = Invocation {
            argv: &argv,
            directory: None,
            input: b"{\"a\":1}".to_vec(),
            environment: vec![("FERMATA_EVENT", "x".as_ref())],
            limit,
        };
        program.run(canceller, &Host::detached())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_program_gets_its_input_and_its_environment() {
        let script = "read line; test \"$line$FERMATA_EVENT\" = '{\"a\":1}x'";
        run(script, LONG, &Canceller::default()).unwrap();
    }

    #[test]
    fn a_failure_shows_the_first_lines_of_stderr() {
        let script = "for i in 1 2 3 4 5 6 7; do echo line $i >&2; done; exit 3";
        let error = run(script, LONG, &Canceller::default()).unwrap_err();
        assert_eq!(error.code, "program_failed");
        assert_eq!(error.message, "sh exited with code 3: line 1; line 2; line 3; line 4; line 5");
    }

    #[test]
    fn a_missing_program_is_a_failure_that_names_it() {
        let argv = ["/nonexistent/program".to_owned()];
        let program =
            Invocation { argv: &argv, directory: None, input: Vec::new(), environment: Vec::new(), limit: LONG };
        let error = program.run(&Canceller::default(), &Host::detached()).unwrap_err();
        assert_eq!(error.code, "not_started");
        assert!(error.message.starts_with("/nonexistent/program cannot be started"));
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed_with_its_children() {
        let started = Instant::now();
        let canceller = Canceller::default();
        let error = run("sleep 1000 & sleep 1000", Duration::from_millis(100), &canceller);
        assert_eq!(error.unwrap_err().code, "timeout");
        assert!(started.elapsed() < LONG);
    }

    #[test]
    fn a_program_is_killed_when_another_thread_cancels_it() {
        let canceller = Canceller::default();
        let error = thread::scope(|scope| {
            let running = scope.spawn(|| run("sleep 1000", LONG, &canceller));
            while canceller.running.lock().unwrap().is_none() {
                thread::yield_now();
            }
            canceller.cancel();
            running.join().unwrap().unwrap_err()
        });
        assert_eq!(error.code, "cancelled");
    }

    #[test]
    fn a_background_job_does_not_outlive_its_program() {
        let started = Instant::now();
        run("sleep 1000 & exit 0", LONG, &Canceller::default()).unwrap();
        assert!(started.elapsed() < LONG);
    }
}
