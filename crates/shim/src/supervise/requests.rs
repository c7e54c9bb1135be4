//! What the daemon asks of the shim, and how it is answered.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{Life, Supervisor, done};
use crate::connection::{ConnectionId, Incoming};
use crate::freeze::{Answer, Caller, Refused, encode};
use crate::wire::{AgentState, Call, FromShim, RefusalCode, Request, Status, Typed, WIRE_VERSION, Watching};
use fermata_os::process;

impl Supervisor {
    pub(super) fn serve(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.iter_mut().find(|c| c.id() == id) else {
            return;
        };
        connection.flush();
        for incoming in connection.receive() {
            match incoming {
                Incoming::Hello => {
                    let (run_id, terminal) = (self.spec.run_id.clone(), self.terminal.is_some());
                    let (shim, suspended) = (self.shim, Some(self.stopped_by_others));
                    let hello = FromShim::Hello { version: WIRE_VERSION, run_id, shim, terminal, suspended };
                    self.send(id, &hello);
                }
                Incoming::Call(call) => self.call(id, call),
            }
        }
    }

    fn call(&mut self, connection: ConnectionId, call: Call) {
        let now = Instant::now();
        let caller = Caller { connection, id: call.id };
        let ended = !matches!(self.life, Life::Running);
        let answer = match call.request {
            Request::Status {} => self.status(now),
            Request::Kill {} if matches!(self.life, Life::After(_)) => {
                self.cut_post_stop_short(now);
                done()
            }
            // Ending is idempotent, and there is nothing left to thaw.
            Request::Stop { .. } | Request::Kill {} if self.has_ended() => done(),
            Request::Stop { grace_ms } => {
                let grace = Duration::from_millis(grace_ms.unwrap_or(self.spec.stop_grace_ms));
                self.stop(grace, now)
            }
            Request::Kill {} => {
                let news = self.freeze.abandon(false, now);
                self.tell(news);
                if !matches!(self.life, Life::Killing { .. }) {
                    self.life = Life::Killing { work: self.kill_tree() };
                }
                done()
            }
            Request::Watch { .. } | Request::Type { .. } | Request::Resize(_) => {
                self.use_terminal(connection, call.request)
            }
            Request::Thaw {} if ended => done(),
            _ if ended => Err(Refused::new(RefusalCode::Ending, "the agent is ending")),
            Request::Quiesce { grace_ms, lease_ms } => {
                let (grace, lease) = (Duration::from_millis(grace_ms), Duration::from_millis(lease_ms));
                let news = self.freeze.quiesce(caller, grace, lease, now);
                return self.tell(news);
            }
            Request::Freeze { lease_ms } => {
                let news = self.freeze.freeze(caller, Duration::from_millis(lease_ms), now);
                return self.tell(news);
            }
            Request::Renew { lease_ms } => self.freeze.renew(Duration::from_millis(lease_ms), now),
            Request::Hold {} => self.freeze.commit(now),
            Request::Thaw {} => {
                let (answer, news) = self.freeze.thaw();
                self.tell(news);
                answer
            }
            Request::Signal { signal: libc::SIGCONT } if !self.freeze.is_idle() => {
                let message = "the agent is frozen, or about to be: resume it";
                Err(Refused::new(RefusalCode::Held, message))
            }
            // What Ctrl-Z stopped is the whole group. It is ours for as long as its leader, our
            // child, has not been reaped.
            Request::Signal { signal: libc::SIGCONT } => {
                killpg(Pid::from_raw(self.agent.pid), Signal::SIGCONT).ok();
                done()
            }
            Request::Signal { signal } => match process::signal(self.agent, signal) {
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

    fn status(&self, now: Instant) -> Answer {
        let (lease_remaining_ms, held) = self.freeze.lease(now);
        let state = match self.life {
            Life::Running | Life::Stopping { .. } => self.freeze.state(),
            _ => AgentState::Ending,
        };
        encode(&Status {
            agent: self.agent,
            state,
            mechanism: self.freeze.mechanism(),
            lease_remaining_ms,
            held,
            processes: self.freeze.count(),
            log_bytes_lost: self.log.lost(),
        })
    }

    /// An agent that is being stopped may still ask whether to save: until its end it is watched and
    /// typed to.
    fn use_terminal(&mut self, connection: ConnectionId, request: Request) -> Answer {
        let (ended, held) = (self.has_ended(), !self.freeze.is_idle());
        let Some(terminal) = &mut self.terminal else {
            return Err(Refused::new(RefusalCode::NoTerminal, "the agent has no terminal"));
        };
        if ended {
            return Err(Refused::new(RefusalCode::Ending, "the agent has ended"));
        }
        match request {
            Request::Watch { scrollback } => {
                terminal.watch(connection, scrollback)?;
                encode(&Watching { size: terminal.size() })
            }
            Request::Type { .. } if held => {
                Err(Refused::new(RefusalCode::Held, "the agent is frozen, or about to be, and takes no input"))
            }
            Request::Type { data } => encode(&Typed { bytes: terminal.take(&data.0) as u64 }),
            Request::Resize(size) => terminal.resize(size).and_then(|()| done()),
            _ => done(),
        }
    }

    fn stop(&mut self, grace: Duration, now: Instant) -> Answer {
        match &mut self.life {
            Life::Stopping { kill_at } => *kill_at = (*kill_at).min(now + grace),
            Life::Running => {
                let group = Pid::from_raw(self.agent.pid);
                // SIGTERM first: it waits while they are frozen or stopped, and is the first thing
                // that they see afterwards. SIGCONT to all, because a stop also reaches who was
                // stopped by somebody else.
                killpg(group, Signal::SIGTERM).ok();
                let (thawed, news) = self.freeze.thaw();
                killpg(group, Signal::SIGCONT).ok();
                self.tell(news);
                self.life = Life::Stopping { kill_at: now + grace };
                if let Err(refused) = thawed {
                    eprintln!("fermata-shim: stopping goes on, but: {}", refused.message);
                }
            }
            // Already on its way.
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
