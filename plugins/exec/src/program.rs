//! Runs one program to its end, or to the end of its time.
//!
//! ```text
//!   this thread      starts it, waits for the first of: exited, cancelled, time is up;
//!                    then kills its process group, reaps it and reports
//!   feeder           writes the request to its stdin
//!   reader           keeps the beginning of its stderr, discards the rest
//!   watcher          waits for its exit without reaping it
//! ```
//!
//! The program is reaped last and here alone, so the number of its group cannot have passed to
//! somebody else when the group is killed. Its stdout is the host's, hence the daemon's log.

use fermata_plugin_api::{Failure, Host};
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

/// How much of stderr is kept.
const STDERR_BYTES: usize = 4096;
/// How many lines of it an error shows.
const STDERR_LINES: usize = 5;
/// How long the end of stderr is waited for once the program is gone: a process that has left
/// the group may still hold it.
const STDERR_PATIENCE: Duration = Duration::from_millis(200);

/// What is to be run.
pub struct Program<'a> {
    /// Program and arguments; never empty.
    pub argv: &'a [String],
    /// Where it runs; the host's own directory if not said.
    pub directory: Option<&'a Path>,
    /// What it gets on stdin.
    pub input: Vec<u8>,
    /// Variables in addition to the host's.
    pub environment: Vec<(&'static str, &'a OsStr)>,
    /// How long it may run.
    pub limit: Duration,
}

/// How waiting for a program ended.
enum Outcome {
    Exited,
    Cancelled,
}

/// Lets another thread cancel the program that is running, if one is.
#[derive(Default)]
pub struct Canceller {
    running: Mutex<Option<Sender<Outcome>>>,
}

impl Canceller {
    /// Cancels the program that is running.
    pub fn cancel(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outcome) = &*running {
            // It may have ended just now.
            outcome.send(Outcome::Cancelled).ok();
        }
    }

    fn set(&self, outcome: Option<Sender<Outcome>>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
    }
}

impl Program<'_> {
    /// Runs the program; its failure says what it has written to stderr.
    pub fn run(self, canceller: &Canceller, host: &Host) -> Result<(), Failure> {
        let name = self.argv[0].clone();
        let limit = self.limit;
        let until = Instant::now() + limit;
        let (outcome, outcomes) = channel();
        canceller.set(Some(outcome.clone()));
        // A cancel from before the sender was there is seen here.
        let result = if host.cancelled() {
            Err(Failure::cancelled())
        } else {
            self.spawn().and_then(|running| running.wait(&name, outcome, &outcomes, until, limit))
        };
        canceller.set(None);
        result
    }

    fn spawn(self) -> Result<Running, Failure> {
        let name = &self.argv[0];
        let failed = |what: &str, error: std::io::Error| Failure::new("not_started", format!("{name} {what}: {error}"));
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
            // A program that does not read its input is none the worse for it.
            thread::Builder::new().spawn(move || stdin.write_all(&input)).map_err(|e| failed("cannot be fed", e))?;
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

/// A program that was started; dropping it kills and reaps it.
struct Running {
    child: Child,
    stderr: Receiver<String>,
}

impl Running {
    fn wait(
        mut self,
        name: &str,
        outcome: Sender<Outcome>,
        outcomes: &Receiver<Outcome>,
        until: Instant,
        limit: Duration,
    ) -> Result<(), Failure> {
        let pid = self.pid();
        thread::Builder::new()
            .spawn(move || {
                let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
                while waitid(Id::Pid(pid), flags) == Err(nix::errno::Errno::EINTR) {}
                // Whoever waited may have given up.
                outcome.send(Outcome::Exited).ok();
            })
            .map_err(|error| Failure::new("not_watched", error.to_string()))?;
        let patience = until.saturating_duration_since(Instant::now());
        let failure = match outcomes.recv_timeout(patience) {
            Ok(Outcome::Exited) => None,
            Ok(Outcome::Cancelled) | Err(RecvTimeoutError::Disconnected) => Some(Failure::cancelled()),
            Err(RecvTimeoutError::Timeout) => {
                Some(Failure::new("timeout", format!("{name} took longer than {limit:?}")))
            }
        };
        let status = self.end();
        match (failure, status) {
            (Some(failure), _) => Err(failure),
            (None, Ok(status)) if status.success() => Ok(()),
            (None, Ok(status)) => Err(self.explain(name, status)),
            (None, Err(error)) => Err(Failure::new("not_watched", error.to_string())),
        }
    }

    fn pid(&self) -> Pid {
        // Linux's process ids fit into an i32.
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Kills what is left of the program's group, then reaps the program.
    fn end(&mut self) -> std::io::Result<ExitStatus> {
        // The program is not reaped, so the group is still its own. A group that is only a zombie
        // by now is no error.
        killpg(self.pid(), Signal::SIGKILL).ok();
        self.child.wait()
    }

    fn explain(&self, name: &str, status: ExitStatus) -> Failure {
        let ended = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exited with code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended strangely".to_owned(),
        };
        let stderr = self.stderr.recv_timeout(STDERR_PATIENCE).unwrap_or_default();
        let lines: Vec<&str> =
            stderr.lines().map(str::trim_end).filter(|line| !line.is_empty()).take(STDERR_LINES).collect();
        let message = match lines.is_empty() {
            true => format!("{name} {ended}"),
            false => format!("{name} {ended}: {}", lines.join("; ")),
        };
        Failure::new("program_failed", message)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After `end` the child is reaped and remembers it: then nothing must be killed.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.end().ok();
        }
    }
}

/// Reads to the end, and returns the beginning.
fn beginning(mut stream: impl Read) -> String {
    let mut kept = Vec::new();
    let mut chunk = [0; 4096];
    // An error ends it as well as the end does.
    while let Ok(count @ 1..) = stream.read(&mut chunk) {
        let room = STDERR_BYTES - kept.len();
        kept.extend_from_slice(&chunk[..count.min(room)]);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, limit: Duration, canceller: &Canceller) -> Result<(), Failure> {
        let argv = ["sh", "-c", script].map(str::to_owned);
        let program = Program {
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
        let failure = run(script, LONG, &Canceller::default()).unwrap_err();
        assert_eq!(failure.code, "program_failed");
        assert_eq!(failure.message, "sh exited with code 3: line 1; line 2; line 3; line 4; line 5");
    }

    #[test]
    fn a_missing_program_is_a_failure_that_names_it() {
        let argv = ["/nonexistent/program".to_owned()];
        let program = Program { argv: &argv, directory: None, input: Vec::new(), environment: Vec::new(), limit: LONG };
        let failure = program.run(&Canceller::default(), &Host::detached()).unwrap_err();
        assert_eq!(failure.code, "not_started");
        assert!(failure.message.starts_with("/nonexistent/program cannot be started"));
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed_with_its_children() {
        let started = Instant::now();
        let canceller = Canceller::default();
        let failure = run("sleep 1000 & sleep 1000", Duration::from_millis(100), &canceller);
        assert_eq!(failure.unwrap_err().code, "timeout");
        assert!(started.elapsed() < LONG);
    }

    #[test]
    fn a_program_is_killed_when_another_thread_cancels_it() {
        let canceller = Canceller::default();
        let failure = thread::scope(|scope| {
            let running = scope.spawn(|| run("sleep 1000", LONG, &canceller));
            while canceller.running.lock().unwrap().is_none() {
                thread::yield_now();
            }
            canceller.cancel();
            running.join().unwrap().unwrap_err()
        });
        assert_eq!(failure.code, "cancelled");
    }

    #[test]
    fn a_background_job_does_not_outlive_its_program() {
        let started = Instant::now();
        run("sleep 1000 & exit 0", LONG, &Canceller::default()).unwrap();
        assert!(started.elapsed() < LONG);
    }
}
