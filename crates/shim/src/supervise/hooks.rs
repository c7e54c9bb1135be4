//! The commands beside the agent: pre-start runs before the agent's program in the same process, post-stop after its
//! end.
//!
//! ```text
//!  pre-start:   begins ─► ended ─► (exit code 0) the agent's program executes
//!                           └────► (else) a failed start, with the reason in the exit record
//!
//!  post-stop:   Noting (ended.json) ─► Running ─► Clearing (its tree) ─► Draining ─► the exit record
//! ```
//!
//! Processes left by pre-start belong to the agent's tree. Processes left by post-stop are killed. The exit record is
//! written last, since the daemon may start the next run once it exists. A preliminary record, `ended.json`, is written
//! before post-stop starts, so that a `kill -9` of the shim in between does not lose it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::AgentSupervisor;
use super::life::{CLEAR_PATIENCE, DRAIN_PATIENCE, Flow, Life, PostStopStage, PreStart, RECORD_PATIENCE, RECORD_RETRY};
use crate::launch_report::explain;
use crate::log_line::Stream;
use crate::pipes::{open_null_file, output_pipe};
use crate::raw::RawString;
use crate::record::ExitRecord;
use crate::reply::failed_to;
use crate::spec::HookSpec;
use fermata_os::clock;
use fermata_os::prelude::{Prelude, PreludeStep, ProcessEnd};
use fermata_os::process::{self, ChildChange, ProcessId};

impl AgentSupervisor {
    pub(super) fn begin_pre_start(&mut self, prelude: Prelude) {
        let Some(hook) = &self.spec.pre_start else { return };
        let left = Some(Duration::from_millis(hook.timeout_ms));
        let line = format!("pre-start begins: {}", hook.line());
        self.log.say(Stream::Note, line.as_bytes(), clock::unix_ns());
        self.pre_start = Some(PreStart { prelude, left, checked_at: Instant::now(), clock_runs: true });
    }

    pub(super) fn pre_start_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.pre_start.as_ref().map(|pre_start| pre_start.prelude.as_fd())
    }

    /// When the pre-start command exceeds its time limit.
    pub(super) fn pre_start_timeout(&self, now: Instant) -> Option<Instant> {
        let pre_start = self.pre_start.as_ref().filter(|pre_start| pre_start.clock_runs)?;
        pre_start.left.map(|left| now + left)
    }

    /// Reads the progress of the start, and counts the time of the pre-start command.
    pub(super) fn watch_pre_start(&mut self, now: Instant) {
        while let Some(pre_start) = &mut self.pre_start {
            match pre_start.prelude.step() {
                PreludeStep::Waiting => break,
                PreludeStep::Executes => self.pre_start = None,
                PreludeStep::Ended(ending) => {
                    pre_start.left = None;
                    self.pre_start_ended(ending);
                }
                PreludeStep::Failed(error) => self.start_failed(explain(&self.spec, &error).message),
            }
        }
        let idle = self.freeze.is_idle();
        if let Some(pre_start) = &mut self.pre_start {
            let passed = now.saturating_duration_since(pre_start.checked_at);
            if let Some(left) = pre_start.left.as_mut().filter(|_| pre_start.clock_runs) {
                *left = left.saturating_sub(passed);
            }
            (pre_start.checked_at, pre_start.clock_runs) = (now, idle);
            if pre_start.left == Some(Duration::ZERO) && idle && matches!(self.life, Life::Running) {
                pre_start.left = None;
                self.pre_start_is_late(now);
            }
        }
    }

    fn pre_start_ended(&mut self, ending: ProcessEnd) {
        // The output of the command, which is in the pipes, precedes the note.
        self.drain_output();
        let note = format!("pre-start ended with {ending}");
        self.log.say(Stream::Note, note.as_bytes(), clock::unix_ns());
        if ending == ProcessEnd::Code(0) {
            if let Some(pre_start) = &mut self.pre_start {
                pre_start.prelude.go_on();
            }
        } else {
            let line = self.spec.pre_start.as_ref().map(HookSpec::line).unwrap_or_default();
            self.start_failed(format!("the pre-start command '{line}' ended with {ending}"));
            // If a kill is under way, the child must be ended by its signal.
            if let Some(pre_start) = self.pre_start.as_mut().filter(|_| !matches!(self.life, Life::Killing { .. })) {
                pre_start.prelude.leave();
            }
        }
    }

    fn pre_start_is_late(&mut self, now: Instant) {
        let Some(hook) = &self.spec.pre_start else { return };
        let text = format!("the pre-start command '{}' did not end within {}", hook.line(), seconds(hook.timeout_ms));
        self.start_failed(text);
        let events = self.freeze.abandon(false, now);
        self.report(events);
        self.life = Life::Killing { work: self.kill_tree() };
    }

    /// Records why the start has failed: the first reason counts, and an agent that is being ended has not failed to
    /// start.
    fn start_failed(&mut self, why: String) {
        if matches!(self.life, Life::Running) && self.start_failure.is_none() {
            self.log.say(Stream::Note, why.as_bytes(), clock::unix_ns());
            self.start_failure = Some(why);
        }
    }

    /// Returns the state after the tree has ended and its output has been read.
    pub(super) fn after(&mut self, record: ExitRecord, now: Instant) -> Life {
        match self.spec.post_stop {
            Some(_) => Life::After(PostStopStage::Noting { record, next: now, until: now + RECORD_PATIENCE }),
            None => self.finish(record, now),
        }
    }

    pub(super) fn go_on_after(&mut self, stage: PostStopStage, now: Instant) -> Flow {
        match stage {
            PostStopStage::Noting { record, next, until } if now < next => {
                Flow::Wait(Life::After(PostStopStage::Noting { record, next, until }))
            }
            PostStopStage::Noting { record, until, .. } => {
                let noted = self.ended.as_ref().map_or(Ok(()), |reserve| Self::record(reserve, &record));
                match noted {
                    Err(message) if now < until => {
                        eprintln!("fermata-shim: {message}");
                        Flow::Wait(Life::After(PostStopStage::Noting { record, next: now + RECORD_RETRY, until }))
                    }
                    // The command runs even if the disk cannot be written.
                    _ => Flow::On(self.start_post_stop(record, now)),
                }
            }
            PostStopStage::Running { record, hook, until } if now < until => {
                Flow::Wait(Life::After(PostStopStage::Running { record, hook, until }))
            }
            PostStopStage::Running { record, .. } => {
                let limit = self.spec.post_stop.as_ref().map_or(0, |hook| hook.timeout_ms);
                Flow::On(self.post_stop_is_over(record, Some(format!("did not end within {}", seconds(limit))), now))
            }
            PostStopStage::Clearing { record, mut work, until } => {
                if !work.finishes(self.freeze.group()) && now < until {
                    return Flow::Wait(Life::After(PostStopStage::Clearing { record, work, until }));
                }
                Flow::On(Life::After(PostStopStage::Draining { record, until: now + DRAIN_PATIENCE }))
            }
            PostStopStage::Draining { record, until } => {
                if (self.stdout.is_some() || self.stderr.is_some()) && now < until {
                    return Flow::Wait(Life::After(PostStopStage::Draining { record, until }));
                }
                self.drain_output();
                let how = match &record.post_stop_failure {
                    Some(failure) => failure.clone(),
                    None => "post-stop ended with exit code 0".to_owned(),
                };
                self.log.say(Stream::Note, how.as_bytes(), clock::unix_ns());
                Flow::On(self.finish(record, now))
            }
        }
    }

    fn start_post_stop(&mut self, record: ExitRecord, now: Instant) -> Life {
        let Some(hook) = self.spec.post_stop.clone() else { return self.finish(record, now) };
        let note = format!("post-stop begins: {}", hook.line());
        self.log.say(Stream::Note, note.as_bytes(), clock::unix_ns());
        match self.spawn_post_stop(&hook, &record) {
            Ok(hook_id) => {
                let until = now + Duration::from_millis(hook.timeout_ms);
                Life::After(PostStopStage::Running { record, hook: hook_id, until })
            }
            Err(why) => self.post_stop_is_over(record, Some(format!("cannot be executed: {why}")), now),
        }
    }

    fn spawn_post_stop(&mut self, hook: &HookSpec, record: &ExitRecord) -> Result<ProcessId, String> {
        let mut more = Vec::new();
        let mut set = |name: &str, value: i32| more.push((RawString::from(name), RawString::from(value.to_string())));
        match (record.code, record.signal) {
            (_, Some(signal)) => set("FERMATA_EXIT_SIGNAL", signal),
            (Some(code), None) => set("FERMATA_EXIT_CODE", code),
            (None, None) => {}
        }
        let program = self.spec.program(&hook.argv, &more).map_err(|error| failed_to(&error))?;
        let (stdout, theirs_out) = output_pipe().map_err(|error| failed_to(&error))?;
        let (stderr, theirs_err) = output_pipe().map_err(|error| failed_to(&error))?;
        let null = open_null_file().map_err(|error| failed_to(&error))?;
        let procs = match self.freeze.group() {
            // A group that was killed while frozen would freeze the command.
            Some(group) => {
                group.thaw().and_then(|()| group.procs_file()).map(Some).map_err(|error| failed_to(&error))?
            }
            None => None,
        };
        let spawned = program.spawn(null.as_fd(), theirs_out.as_fd(), theirs_err.as_fd(), procs.as_ref(), None);
        let (pid, _) = spawned.map_err(|error| failed_to(&error))?;
        (self.stdout, self.stderr) = (Some(stdout.into()), Some(stderr.into()));
        match process::identify(pid.as_raw()) {
            Ok(Some(id)) => Ok(id),
            // Cannot happen: a child of this process stays in /proc until it is reaped.
            Ok(None) => Err(format!("process {pid} is not in /proc")),
            Err(error) => Err(failed_to(&error)),
        }
    }

    /// Handles the end of the post-stop command, if `pid` is that command.
    pub(super) fn reaped_post_stop(&mut self, pid: i32, change: ChildChange, now: Instant) {
        let ending = match change {
            ChildChange::Exited(code) => ProcessEnd::Code(code),
            ChildChange::Signaled { signal, .. } => ProcessEnd::Signal(signal),
            ChildChange::Stopped(_) | ChildChange::Continued => return,
        };
        if let Life::After(PostStopStage::Running { record, hook, .. }) = &self.life
            && hook.pid == pid
        {
            let failure = (ending != ProcessEnd::Code(0)).then(|| format!("ended with {ending}"));
            self.life = self.post_stop_is_over(record.clone(), failure, now);
        }
    }

    /// Ends the post-stop command before its time, for a kill.
    pub(super) fn cut_post_stop_short(&mut self, now: Instant) {
        if let Life::After(PostStopStage::Running { record, .. }) = &self.life {
            self.life = self.post_stop_is_over(record.clone(), Some("was killed".to_owned()), now);
        }
    }

    fn post_stop_is_over(&self, mut record: ExitRecord, failure: Option<String>, now: Instant) -> Life {
        let line = self.spec.post_stop.as_ref().map(HookSpec::line).unwrap_or_default();
        record.post_stop_failure = failure.map(|failure| format!("the post-stop command '{line}' {failure}"));
        Life::After(PostStopStage::Clearing { record, work: self.kill_tree(), until: now + CLEAR_PATIENCE })
    }
}

fn seconds(ms: u64) -> String {
    if ms.is_multiple_of(1000) { format!("{} s", ms / 1000) } else { format!("{ms} ms") }
}
