//! Carries out the requests of the daemon.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::AgentSupervisor;
use super::life::Life;
use crate::connection::{ConnectionId, PeerLine};
use crate::reply::{PendingCall, Refused, ShimReply, done, encode};
use crate::terminal::Terminal;
use crate::wire::{FromShim, RefusalCode, ShimCall, ShimRequest, Status, TreeState, Typed, WIRE_VERSION, Watching};
use fermata_os::process;

impl AgentSupervisor {
    pub(super) fn serve(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.iter_mut().find(|c| c.id() == id) else {
            return;
        };
        connection.flush();
        for incoming in connection.receive() {
            match incoming {
                PeerLine::Hello => {
                    let (run_id, terminal) = (self.spec.run_id.clone(), self.terminal.is_some());
                    let (shim, suspended) = (self.shim, Some(self.stopped_by_others));
                    let hello = FromShim::Hello { version: WIRE_VERSION, run_id, shim, terminal, suspended };
                    self.send(id, &hello);
                }
                PeerLine::Call(call) => self.call(id, call),
            }
        }
    }

    fn call(&mut self, connection: ConnectionId, call: ShimCall) {
        let now = Instant::now();
        let caller = PendingCall { connection, id: call.id };
        let ended = !matches!(self.life, Life::Running);
        let answer = match call.request {
            ShimRequest::Status {} => self.status(now),
            ShimRequest::Kill {} if matches!(self.life, Life::After(_)) => {
                self.cut_post_stop_short(now);
                done()
            }
            // Ending is idempotent.
            ShimRequest::Stop { .. } | ShimRequest::Kill {} if self.life.has_ended() => done(),
            ShimRequest::Stop { grace_ms } => {
                let grace = Duration::from_millis(grace_ms.unwrap_or(self.spec.stop_grace_ms));
                self.stop(grace, now)
            }
            ShimRequest::Kill {} => {
                let events = self.freeze.abandon(false, now);
                self.report(events);
                if !matches!(self.life, Life::Killing { .. }) {
                    self.life = Life::Killing { work: self.kill_tree() };
                }
                done()
            }
            ShimRequest::Watch { scrollback } => self.watch_terminal(connection, scrollback),
            ShimRequest::Type { data } => self.type_in(&data.0),
            ShimRequest::Resize(size) => {
                self.live_terminal().and_then(|terminal| terminal.resize(size)).and_then(|()| done())
            }
            ShimRequest::Thaw {} if ended => done(),
            ShimRequest::Quiesce { .. }
            | ShimRequest::Freeze { .. }
            | ShimRequest::Renew { .. }
            | ShimRequest::Commit {}
            | ShimRequest::Signal { .. }
                if ended =>
            {
                Err(Refused::new(RefusalCode::Ending, "the agent is ending"))
            }
            ShimRequest::Quiesce { grace_ms, lease_ms } => {
                let (grace, lease) = (Duration::from_millis(grace_ms), Duration::from_millis(lease_ms));
                let events = self.freeze.quiesce(caller, grace, lease, now);
                return self.report(events);
            }
            ShimRequest::Freeze { lease_ms } => {
                let events = self.freeze.freeze(caller, Duration::from_millis(lease_ms), now);
                return self.report(events);
            }
            ShimRequest::Renew { lease_ms } => self.freeze.renew(Duration::from_millis(lease_ms), now),
            ShimRequest::Commit {} => self.freeze.commit(now),
            ShimRequest::Thaw {} => {
                let (answer, events) = self.freeze.thaw();
                self.report(events);
                answer
            }
            ShimRequest::Signal { signal: libc::SIGCONT } if !self.freeze.is_idle() => {
                let message = "the agent is frozen, or about to be: resume it";
                Err(Refused::new(RefusalCode::AgentFrozen, message))
            }
            // Ctrl-Z has stopped the whole group. Its number cannot be reused before its leader, a child of the shim, has
            // been reaped.
            ShimRequest::Signal { signal: libc::SIGCONT } => {
                killpg(Pid::from_raw(self.agent.pid), Signal::SIGCONT).ok();
                done()
            }
            ShimRequest::Signal { signal } => match process::signal(self.agent, signal) {
                Ok(true) => done(),
                Ok(false) => Err(Refused::new(RefusalCode::Ending, "the agent has ended")),
                Err(error) => {
                    let message = format!("failed to send signal {signal}: {error}");
                    Err(Refused::new(RefusalCode::SignalFailed, message))
                }
            },
        };
        self.answer(caller, answer);
    }

    fn status(&self, now: Instant) -> ShimReply {
        let (lease_remaining_ms, committed) = self.freeze.lease(now);
        let state = match self.life {
            Life::Running | Life::Stopping { .. } => self.freeze.state(),
            Life::Killing { .. }
            | Life::Clearing { .. }
            | Life::Draining { .. }
            | Life::After(_)
            | Life::Recording { .. }
            | Life::Over { .. } => TreeState::Ending,
        };
        encode(&Status {
            agent: self.agent,
            state,
            mechanism: self.freeze.mechanism(),
            lease_remaining_ms,
            committed,
            processes: self.freeze.count(),
            log_bytes_lost: self.log.lost(),
        })
    }

    /// Returns the terminal, for a request to it. An agent that is being stopped may still ask whether to save: it can
    /// be watched and typed to until its end.
    fn live_terminal(&mut self) -> Result<&mut Terminal, Refused> {
        match &mut self.terminal {
            None => Err(Refused::new(RefusalCode::NoTerminal, "the agent has no terminal")),
            Some(_) if self.life.has_ended() => Err(Refused::new(RefusalCode::Ending, "the agent has ended")),
            Some(terminal) => Ok(terminal),
        }
    }

    fn watch_terminal(&mut self, connection: ConnectionId, scrollback: bool) -> ShimReply {
        let terminal = self.live_terminal()?;
        terminal.watch(connection, scrollback)?;
        encode(&Watching { size: terminal.size() })
    }

    fn type_in(&mut self, bytes: &[u8]) -> ShimReply {
        let frozen = !self.freeze.is_idle();
        let terminal = self.live_terminal()?;
        if frozen {
            let message = "the agent is frozen, or about to be, and takes no input";
            return Err(Refused::new(RefusalCode::AgentFrozen, message));
        }
        encode(&Typed { bytes: terminal.take(bytes) as u64 })
    }

    fn stop(&mut self, grace: Duration, now: Instant) -> ShimReply {
        match &mut self.life {
            Life::Stopping { kill_at } => *kill_at = (*kill_at).min(now + grace),
            Life::Running => {
                let group = Pid::from_raw(self.agent.pid);
                // SIGTERM comes first: it stays pending while the processes are frozen or stopped, and is the first signal
                // that they handle afterwards. SIGCONT goes to all, since a stop applies also to processes that were
                // stopped by others.
                killpg(group, Signal::SIGTERM).ok();
                let (thawed, events) = self.freeze.thaw();
                killpg(group, Signal::SIGCONT).ok();
                self.report(events);
                self.life = Life::Stopping { kill_at: now + grace };
                if let Err(refused) = thawed {
                    eprintln!("fermata-shim: {}; the agent is being stopped nevertheless", refused.message);
                }
            }
            // The agent is ending already.
            Life::Killing { .. }
            | Life::Clearing { .. }
            | Life::Draining { .. }
            | Life::After(_)
            | Life::Recording { .. }
            | Life::Over { .. } => {}
        }
        done()
    }
}
