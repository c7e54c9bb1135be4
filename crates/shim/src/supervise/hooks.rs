//! The commands beside the agent: the one before it, in its place, and the one after its end.
//!
//! ```text
//!  before:  begins ─► ended ─► (exit code 0) the agent's program executes
//!                       └────► (else) a failed start, of which the exit record says why
//!
//!  after:   Noting (ended.json) ─► Running ─► Clearing (its tree) ─► Draining ─► the exit record
//! ```
//!
//! What the first one leaves running belongs to the agent's tree. Nothing of the second one stays.
//! Its exit record comes last because the daemon takes that as leave to start the next run; what a
//! `kill -9` of the shim in between must not lose is in `ended.json` before the command begins.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::killing::Killing;
use super::{CLEAR_PATIENCE, DRAIN_PATIENCE, Life, RECORD_PATIENCE, RECORD_RETRY, Supervisor};
use crate::freeze::failed_to;
use crate::launcher::{open_null_file, output_pipe, program, why_not_started};
use crate::log_line::Stream;
use crate::raw::Raw;
use crate::record::ExitRecord;
use crate::spec::HookSpec;
use fermata_os::clock;
use fermata_os::prelude::{Ending, Prelude, Step};
use fermata_os::process::{self, Change, ProcessId};
use fermata_os::tree::Progress;

/// The command before the agent, as long as the agent's program does not execute.
#[derive(Debug)]
pub(super) struct Beginning {
    prelude: Prelude,
    /// How long it may still run; none once it has ended.
    left: Option<Duration>,
    looked: Instant,
    /// Whether its time ran since the last look: nobody held it.
    counts: bool,
}

/// What comes after the agent's end.
#[derive(Debug)]
pub(super) enum AfterStop {
    /// The exit is written down before anything else.
    Noting { record: ExitRecord, next: Instant, until: Instant },
    /// The command runs.
    Running { record: ExitRecord, hook: ProcessId, until: Instant },
    /// What it left is killed.
    Clearing { record: ExitRecord, work: Killing, until: Instant },
    /// Its last output is taken.
    Draining { record: ExitRecord, until: Instant },
}

/// Whether to look at a state again at once.
pub(super) enum Flow {
    /// It may go on further.
    On(Life),
    /// Something has to happen first.
    Wait(Life),
}

impl Supervisor {
    pub(super) fn begin(&mut self, prelude: Prelude) {
        let Some(hook) = &self.spec.pre_start else { return };
        let left = Some(Duration::from_millis(hook.timeout_ms));
        let line = format!("pre-start begins: {}", hook.line());
        self.log.say(Stream::Note, line.as_bytes(), clock::unix_ns());
        self.beginning = Some(Beginning { prelude, left, looked: Instant::now(), counts: true });
    }

    pub(super) fn beginning_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.beginning.as_ref().map(|beginning| beginning.prelude.as_fd())
    }

    /// When the command before the agent has had its time.
    pub(super) fn beginning_due(&self, now: Instant) -> Option<Instant> {
        let beginning = self.beginning.as_ref().filter(|beginning| beginning.counts)?;
        beginning.left.map(|left| now + left)
    }

    /// Looks how far the start has come, and counts its time.
    pub(super) fn watch_beginning(&mut self, now: Instant) {
        while let Some(beginning) = &mut self.beginning {
            match beginning.prelude.step() {
                Step::Waiting => break,
                Step::Executes => self.beginning = None,
                Step::Ended(ending) => {
                    beginning.left = None;
                    self.pre_start_ended(ending);
                }
                Step::Failed(error) => self.start_failed(why_not_started(&self.spec, &error)),
            }
        }
        let idle = self.freeze.is_idle();
        if let Some(beginning) = &mut self.beginning {
            let passed = now.saturating_duration_since(beginning.looked);
            if let Some(left) = beginning.left.as_mut().filter(|_| beginning.counts) {
                *left = left.saturating_sub(passed);
            }
            (beginning.looked, beginning.counts) = (now, idle);
            if beginning.left == Some(Duration::ZERO) && idle && matches!(self.life, Life::Running) {
                beginning.left = None;
                self.pre_start_is_late(now);
            }
        }
    }

    fn pre_start_ended(&mut self, ending: Ending) {
        // All that it wrote is in the pipes: it comes before the note.
        self.drain_output();
        let note = format!("pre-start ended with {ending}");
        self.log.say(Stream::Note, note.as_bytes(), clock::unix_ns());
        if ending == Ending::Code(0) {
            if let Some(beginning) = &mut self.beginning {
                beginning.prelude.go_on();
            }
        } else {
            let line = self.spec.pre_start.as_ref().map(HookSpec::line).unwrap_or_default();
            self.start_failed(format!("the pre-start command '{line}' ended with {ending}"));
            // Where a kill is under way, its signal is what ends the child.
            if let Some(beginning) = self.beginning.as_mut().filter(|_| !matches!(self.life, Life::Killing { .. })) {
                beginning.prelude.leave();
            }
        }
    }

    fn pre_start_is_late(&mut self, now: Instant) {
        let Some(hook) = &self.spec.pre_start else { return };
        let text = format!("the pre-start command '{}' did not end within {}", hook.line(), seconds(hook.timeout_ms));
        self.start_failed(text);
        let news = self.freeze.abandon(false, now);
        self.tell(news);
        self.life = Life::Killing { work: self.kill_tree() };
    }

    /// The first reason counts; an agent that is being ended has no failed start.
    fn start_failed(&mut self, why: String) {
        if matches!(self.life, Life::Running) && self.start_failure.is_none() {
            self.log.say(Stream::Note, why.as_bytes(), clock::unix_ns());
            self.start_failure = Some(why);
        }
    }

    /// What comes when the tree is gone and its output taken.
    pub(super) fn after(&mut self, record: ExitRecord, now: Instant) -> Life {
        match self.spec.post_stop {
            Some(_) => Life::After(AfterStop::Noting { record, next: now, until: now + RECORD_PATIENCE }),
            None => self.finish(record, now),
        }
    }

    pub(super) fn after_due(stage: &AfterStop, now: Instant) -> Instant {
        match stage {
            AfterStop::Noting { next, .. } => *next,
            AfterStop::Running { until, .. } | AfterStop::Draining { until, .. } => *until,
            AfterStop::Clearing { work, .. } => now + work.tick(now),
        }
    }

    pub(super) fn go_on_after(&mut self, stage: AfterStop, now: Instant) -> Flow {
        match stage {
            AfterStop::Noting { record, next, until } if now < next => {
                Flow::Wait(Life::After(AfterStop::Noting { record, next, until }))
            }
            AfterStop::Noting { record, until, .. } => {
                let noted = self.ended.as_ref().map_or(Ok(()), |reserve| Self::record(reserve, &record));
                match noted {
                    Err(message) if now < until => {
                        eprintln!("fermata-shim: {message}");
                        Flow::Wait(Life::After(AfterStop::Noting { record, next: now + RECORD_RETRY, until }))
                    }
                    // Who looks after the agent wants its command to run even if the disk takes nothing.
                    _ => Flow::On(self.start_post_stop(record, now)),
                }
            }
            AfterStop::Running { record, hook, until } if now < until => {
                Flow::Wait(Life::After(AfterStop::Running { record, hook, until }))
            }
            AfterStop::Running { record, .. } => {
                let limit = self.spec.post_stop.as_ref().map_or(0, |hook| hook.timeout_ms);
                Flow::On(self.post_stop_is_over(record, Some(format!("did not end within {}", seconds(limit))), now))
            }
            AfterStop::Clearing { record, mut work, until } => {
                let below = matches!(work.step(), Some(Progress::Done));
                let group = self.freeze.group().is_none_or(|group| !group.populated().unwrap_or(false));
                if !(below && group) && now < until {
                    return Flow::Wait(Life::After(AfterStop::Clearing { record, work, until }));
                }
                Flow::On(Life::After(AfterStop::Draining { record, until: now + DRAIN_PATIENCE }))
            }
            AfterStop::Draining { record, until } => {
                if (self.stdout.is_some() || self.stderr.is_some()) && now < until {
                    return Flow::Wait(Life::After(AfterStop::Draining { record, until }));
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
                Life::After(AfterStop::Running { record, hook: hook_id, until })
            }
            Err(why) => self.post_stop_is_over(record, Some(format!("cannot be executed: {why}")), now),
        }
    }

    fn spawn_post_stop(&mut self, hook: &HookSpec, record: &ExitRecord) -> Result<ProcessId, String> {
        let mut more = Vec::new();
        let mut set = |name: &str, value: i32| more.push((Raw::from(name), Raw::from(value.to_string())));
        match (record.code, record.signal) {
            (_, Some(signal)) => set("FERMATA_EXIT_SIGNAL", signal),
            (Some(code), None) => set("FERMATA_EXIT_CODE", code),
            (None, None) => {}
        }
        let program = program(&self.spec, &hook.argv, &more).map_err(|error| failed_to(&error))?;
        let (stdout, theirs_out) = output_pipe().map_err(|error| failed_to(&error))?;
        let (stderr, theirs_err) = output_pipe().map_err(|error| failed_to(&error))?;
        let null = open_null_file().map_err(|error| failed_to(&error))?;
        let procs = match self.freeze.group() {
            // A group that was killed while frozen would hold whoever enters it.
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
            // A child of ours stays in /proc until it is reaped.
            Ok(None) => Err(format!("process {pid} is not in /proc")),
            Err(error) => Err(failed_to(&error)),
        }
    }

    /// Takes note when the process that ended is the command after the agent's end.
    pub(super) fn reaped_post_stop(&mut self, pid: i32, change: Change, now: Instant) {
        let ending = match change {
            Change::Exited(code) => Ending::Code(code),
            Change::Signaled { signal, .. } => Ending::Signal(signal),
            Change::Stopped(_) | Change::Continued => return,
        };
        self.life = match std::mem::replace(&mut self.life, Life::Running) {
            Life::After(AfterStop::Running { record, hook, .. }) if hook.pid == pid => {
                let failure = (ending != Ending::Code(0)).then(|| format!("ended with {ending}"));
                self.post_stop_is_over(record, failure, now)
            }
            other => other,
        };
    }

    /// Ends the command after the agent's end before its time; for a kill.
    pub(super) fn cut_post_stop_short(&mut self, now: Instant) {
        self.life = match std::mem::replace(&mut self.life, Life::Running) {
            Life::After(AfterStop::Running { record, .. }) => {
                self.post_stop_is_over(record, Some("was killed".to_owned()), now)
            }
            other => other,
        };
    }

    fn post_stop_is_over(&mut self, mut record: ExitRecord, failure: Option<String>, now: Instant) -> Life {
        let line = self.spec.post_stop.as_ref().map(HookSpec::line).unwrap_or_default();
        record.post_stop_failure = failure.map(|failure| format!("the post-stop command '{line}' {failure}"));
        Life::After(AfterStop::Clearing { record, work: self.kill_tree(), until: now + CLEAR_PATIENCE })
    }
}

fn seconds(ms: u64) -> String {
    if ms.is_multiple_of(1000) { format!("{} s", ms / 1000) } else { format!("{ms} ms") }
}
