//! Identifies peers (by the kernel's credentials, by their ancestors, by tokens) and authorises their calls.
//!
//! An authorised call is an [`Authorised`], which only this module can construct.

use fermata_protocol::daemon::Role;
use fermata_protocol::method::{Call, CallSubject, SubjectParam};
use fermata_protocol::{Code, ProjectName, Refusal, Target};
use sha2::{Digest as _, Sha256};

use crate::config::Settings;
use crate::hashing::hex;
use crate::project::Projects;
use fermata_os::peer::{PeerCredentials, group_id};
use fermata_os::process;

/// The most ancestors that are read; the descent of a process with more is unknown.
const MAX_ANCESTORS: usize = 4096;

/// The most ancestors that are read on an async thread: `/proc` is read without a disk.
const FEW_ANCESTORS: usize = 32;

/// How often the ancestors are read again because one of them has ended meanwhile.
const TRIES: u32 = 16;

/// The other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    pub role: Role,
    /// None for a person.
    pub agent: Option<Target>,
    uid: u32,
}

impl Peer {
    /// Returns the text that identifies the peer: idempotency keys belong to it.
    pub fn principal(&self) -> String {
        match &self.agent {
            Some(agent) => format!("agent:{agent}"),
            None => format!("uid:{}", self.uid),
        }
    }
}

/// Identifies a peer if that cannot take long; `None` if it has many ancestors, or its role depends on a group.
pub fn recognise(credentials: &PeerCredentials, projects: &Projects) -> Option<Peer> {
    let uid = credentials.uid;
    match descent(credentials.pid, projects, FEW_ANCESTORS, 1) {
        Descent::Agent(agent) => Some(Peer { role: Role::Agent, agent: Some(agent), uid }),
        Descent::Outside if is_admin(uid) => Some(Peer { role: Role::Admin, agent: None, uid }),
        Descent::Outside | Descent::Unknown => None,
    }
}

fn is_admin(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// Identifies a peer by the kernel's credentials. Blocking: may read groups over a network.
///
/// # Errors
/// `permission_denied` for a user without any role.
pub fn identify(credentials: &PeerCredentials, settings: &Settings, projects: &Projects) -> Result<Peer, Refusal> {
    let uid = credentials.uid;
    let is_outside = match descent(credentials.pid, projects, MAX_ANCESTORS, TRIES) {
        // A process in an agent's tree acts as that agent, whatever its user is.
        Descent::Agent(agent) => return Ok(Peer { role: Role::Agent, agent: Some(agent), uid }),
        Descent::Outside => true,
        Descent::Unknown => false,
    };
    let is_operator = || group_id(&settings.operator_group).ok().flatten().is_some_and(|gid| credentials.in_group(gid));
    let role = if is_outside && is_admin(uid) {
        Role::Admin
    } else if is_outside && is_operator() {
        Role::Operator
    } else if settings.others_may_look {
        Role::Reader
    } else {
        return Err(Refusal::new(Code::PermissionDenied, format!("user {uid} may not use this daemon"))
            .hint(format!("join the group '{}'", settings.operator_group)));
    };
    Ok(Peer { role, agent: None, uid })
}

/// Returns the peer as the agent whose run has this token.
///
/// # Errors
/// `bad_token`, or `permission_denied` for an agent with the token of another one.
pub fn with_token(peer: &Peer, token: &str, projects: &Projects) -> Result<Peer, Refusal> {
    let hash = hex(&Sha256::digest(token.as_bytes()));
    let agent = projects
        .agent_with_token(&hash)
        .ok_or_else(|| Refusal::new(Code::BadToken, "the token belongs to no running agent".to_owned()))?;
    match &peer.agent {
        Some(own) if *own != agent => {
            Err(Refusal::new(Code::PermissionDenied, format!("agent {own} may not act as agent {agent}")))
        }
        Some(_) | None => Ok(Peer { role: Role::Agent, agent: Some(agent), uid: peer.uid }),
    }
}

/// The position of a process relative to the trees of agents.
enum Descent {
    /// It is in the tree of this agent.
    Agent(Target),
    /// It is in no agent's tree.
    Outside,
    /// It cannot be determined, for instance because the process has ended. The process may be in an agent's tree, and
    /// does not get the rights of its user.
    Unknown,
}

fn descent(pid: i32, projects: &Projects, most: usize, tries: u32) -> Descent {
    // The pid of a process outside of our pid namespace; agents are inside.
    if pid == 0 {
        return Descent::Outside;
    }
    for _ in 0..tries {
        let Some(chain) = ancestors(pid, most) else { continue };
        let agent = projects.agent_of_processes(&chain).or_else(|| projects.agent_of_shims(&chain));
        return agent.map_or(Descent::Outside, Descent::Agent);
    }
    Descent::Unknown
}

/// Returns a process and its ancestors; `None` if there are more than `most`, or if one of them has ended meanwhile:
/// then the kernel has given its children another parent.
fn ancestors(pid: i32, most: usize) -> Option<Vec<i32>> {
    let mut chain = Vec::new();
    let mut next = pid;
    while next > 1 {
        if chain.len() == most {
            return None;
        }
        let stat = process::stat(next).ok().flatten()?;
        chain.push(next);
        next = stat.ppid;
    }
    Some(chain)
}

/// A call that its peer may make. Its target is filled in.
#[derive(Debug)]
pub struct Authorised {
    call: Call,
}

impl Authorised {
    pub fn into_call(self) -> Call {
        self.call
    }
}

/// Checks that a peer may make a call. In a call of an agent a missing target is filled in with the agent itself.
///
/// # Errors
/// `permission_denied`, or `invalid_params` when a person's call has no target.
pub fn authorise(peer: &Peer, mut call: Call) -> Result<Authorised, Refusal> {
    let info = call.info();
    let denied = |why: String| Err(Refusal::new(Code::PermissionDenied, why));
    match &peer.agent {
        Some(_) if info.subject == CallSubject::Named => {
            return denied(format!("an agent may not call {}", info.name));
        }
        None if peer.role < info.role => {
            return denied(format!(
                "{} needs the role {}; your role is {}",
                info.name,
                info.role.as_str(),
                peer.role.as_str()
            ));
        }
        Some(_) | None => {}
    }
    if call.reaches_files() && nix::unistd::geteuid().is_root() && peer.uid != 0 && peer.agent.is_none() {
        return Err(Refusal::new(
            Code::PermissionDenied,
            format!("{} would access files with the rights of root, as whom this daemon runs", info.name),
        )
        .hint("use a daemon of your own: unset FERMATA_SOCKET, or give --socket"));
    }
    resolve_target(peer.agent.as_ref(), &mut call)?;
    Ok(Authorised { call })
}

/// Checks the target of a call, or fills in that of an agent's call.
fn resolve_target(own: Option<&Target>, call: &mut Call) -> Result<(), Refusal> {
    match call.subject() {
        SubjectParam::Connection | SubjectParam::Named => Ok(()),
        SubjectParam::Agent(target) => agent_target(own, target),
        SubjectParam::AgentOrProject(target) => any_target(own, target),
        SubjectParam::OwnProject(name) => project(own, name),
        SubjectParam::Project(name) => same_project(own, name),
    }
}

fn missing(parameter: &str) -> Refusal {
    Refusal::new(Code::InvalidParams, format!("'{parameter}' is missing; only an agent's own calls may omit it"))
        .hint("name the agent or the project; the calls of an agent have its token in FERMATA_TOKEN")
}

fn not_yours(own: &Target, target: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(Code::PermissionDenied, format!("agent {own} may not access {target}"))
}

fn agent_target(own: Option<&Target>, target: &mut Option<Target>) -> Result<(), Refusal> {
    any_target(own, target)?;
    match target {
        Some(Target { agent: Some(_), .. }) => Ok(()),
        Some(project) => Err(Refusal::new(
            Code::InvalidParams,
            format!("'target' is the project '{project}', not one of its agents"),
        )
        .hint(format!("{project}/AGENT"))),
        None => Err(missing("target")),
    }
}

fn any_target(own: Option<&Target>, target: &mut Option<Target>) -> Result<(), Refusal> {
    match (own, &*target) {
        (Some(own), Some(given)) if given != own => Err(not_yours(own, given)),
        (Some(own), None) => {
            *target = Some(own.clone());
            Ok(())
        }
        (None, None) => Err(missing("target")),
        (Some(_) | None, Some(_)) => Ok(()),
    }
}

fn project(own: Option<&Target>, given: &mut Option<ProjectName>) -> Result<(), Refusal> {
    match (own, &*given) {
        (_, Some(name)) => same_project(own, name),
        (Some(own), None) => {
            *given = Some(own.project.clone());
            Ok(())
        }
        (None, None) => Err(missing("project")),
    }
}

fn same_project(own: Option<&Target>, given: &ProjectName) -> Result<(), Refusal> {
    match own {
        Some(own) if own.project != *given => Err(not_yours(own, given)),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_protocol::method::METHODS;
    use serde_json::{Value, json};

    fn call(method: &str, params: Value) -> Call {
        let Value::Object(params) = params else { panic!("the parameters of {method} are an object") };
        Call::parse(method, params).expect(method)
    }

    fn person(role: Role) -> Peer {
        Peer { role, agent: None, uid: 0 }
    }

    fn agent(target: &str) -> Peer {
        Peer { role: Role::Agent, agent: Some(target.parse().expect("valid")), uid: 0 }
    }

    /// The expected rules of a method.
    struct Expected {
        method: &'static str,
        params: Value,
        /// The least role of a person who may call it.
        person: Role,
        /// Whether an agent may call it.
        agent: bool,
        /// Whether a daemon of root accepts it from root only.
        reaches_files: bool,
    }

    fn row(method: &'static str, params: Value, person: Role) -> Expected {
        Expected { method, params, person, agent: false, reaches_files: false }
    }

    impl Expected {
        fn and_agents(self) -> Self {
            Self { agent: true, ..self }
        }

        fn reaches_files(self) -> Self {
            Self { reaches_files: true, ..self }
        }

        fn call(&self) -> Call {
            call(self.method, self.params.clone())
        }
    }

    /// One row per method, in the order of the method table. Parameters name the project 'web' and the agent 'web/coder'.
    fn expected() -> Vec<Expected> {
        let project = |more: Value| with(json!({ "project": "web" }), more);
        let target = |more: Value| with(json!({ "target": "web/coder" }), more);
        let (reader, operator, admin) = (Role::Reader, Role::Operator, Role::Admin);
        vec![
            row("hello", json!({ "min": 1, "max": 1, "client": "test" }), reader).and_agents(),
            row("rpc.discover", json!({}), reader).and_agents(),
            row("daemon.status", json!({}), reader),
            row("daemon.reload", json!({}), admin),
            row("project.create", json!({ "name": "web", "workspace": "/w" }), operator).reaches_files(),
            row("project.set", project(json!({})), operator).reaches_files(),
            row("project.list", json!({}), reader),
            row("project.show", project(json!({})), operator).and_agents(),
            row("project.remove", project(json!({})), operator),
            row("project.pause", project(json!({})), operator).and_agents(),
            row("project.resume", project(json!({ "checkpoint": 1 })), operator).reaches_files(),
            row("agent.run", project(json!({ "argv": ["true"] })), operator).reaches_files(),
            row("agent.list", json!({}), reader),
            row("agent.show", target(json!({ "env": { "A": "b" } })), operator).reaches_files(),
            row("agent.stop", target(json!({})), operator),
            row("agent.kill", target(json!({})), operator),
            row("agent.restart", target(json!({})), operator),
            row("agent.remove", target(json!({})), operator),
            row("agent.wait", target(json!({})), reader),
            row("agent.logs", target(json!({})), operator),
            row("agent.attach", target(json!({})), operator).reaches_files(),
            row("agent.input", json!({ "attachment": 1, "data": "" }), operator),
            row("agent.resize", json!({ "attachment": 1, "size": { "rows": 24, "cols": 80 } }), operator),
            row("agent.detach", json!({ "attachment": 1 }), operator),
            row("agent.send", target(json!({ "data": "" })), operator).reaches_files(),
            row("agent.listen", json!({}), operator).and_agents(),
            row("agent.ack", target(json!({})), operator).and_agents(),
            row("agent.progress", target(json!({})), operator).and_agents(),
            row("agent.ready", target(json!({})), operator).and_agents(),
            row("agent.resume", target(json!({})), operator),
            row("agent.usage", target(json!({})), operator).and_agents(),
            row("state.put", target(json!({ "state": 1 })), operator).and_agents(),
            row("state.get", target(json!({})), operator).and_agents(),
            row("task.put", target(json!({})), operator).and_agents(),
            row("task.list", project(json!({})), operator).and_agents(),
            row("question.ask", target(json!({ "text": "?" })), operator).and_agents(),
            row("question.wait", project(json!({ "id": 1 })), operator).and_agents(),
            row("question.list", json!({}), reader),
            row("question.answer", project(json!({ "id": 1, "answer": "yes" })), operator),
            row("context.put", target(json!({ "items": [] })), operator).and_agents(),
            row("context.list", target(json!({})), operator).and_agents(),
            row("context.show", project(json!({ "id": 1 })), operator).and_agents(),
            row("context.pin", project(json!({ "id": 1, "pinned": true })), operator).and_agents(),
            row("context.search", target(json!({ "query": "x" })), operator).and_agents(),
            row("context.recall", project(json!({ "ids": [] })), operator).and_agents(),
            row("context.flash_save", target(json!({})), operator).and_agents(),
            row("checkpoint.create", project(json!({})), operator).and_agents(),
            row("checkpoint.list", project(json!({})), reader),
            row("checkpoint.show", project(json!({ "checkpoint": 1 })), reader),
            row("checkpoint.diff", project(json!({ "from": 1 })), operator).reaches_files(),
            row("checkpoint.restore", project(json!({ "checkpoint": 1 })), operator).reaches_files(),
            row("checkpoint.verify", project(json!({})), operator),
            row("checkpoint.remove", project(json!({ "checkpoints": [] })), operator),
            row("checkpoint.prune", project(json!({})), operator),
            row("checkpoint.pin", project(json!({ "checkpoint": 1, "pinned": true })), operator),
            row("checkpoint.export", project(json!({ "checkpoint": 1 })), operator),
            row("checkpoint.download", json!({ "offset": 0 }), operator),
            row("checkpoint.upload", json!({ "data": "", "offset": 0 }), operator),
            row("checkpoint.import", project(json!({ "sha256": "" })), operator),
            row("checkpoint.consolidate", project(json!({})), operator),
            row("operation.list", json!({}), reader),
            row("operation.show", json!({ "operation_id": "op-1" }), reader),
            row("operation.cancel", json!({ "operation_id": "op-1" }), operator),
            row("events.subscribe", json!({}), reader),
            row("events.unsubscribe", json!({ "subscription": 1 }), reader),
            row("events.list", json!({}), reader),
            row("plugin.list", json!({}), reader),
            row("plugin.reload", json!({}), admin),
            row("plugin.enable", json!({ "name": "x", "enabled": true }), admin),
            row("plugin.check", json!({ "path": "/x.so" }), admin),
        ]
    }

    fn with(mut params: Value, more: Value) -> Value {
        let members = params.as_object_mut().expect("an object");
        members.extend(more.as_object().expect("an object").clone());
        params
    }

    /// Authorises a call; returns the code of the refusal.
    fn answer(peer: &Peer, call: Call) -> Result<(), Code> {
        authorise(peer, call).map(drop).map_err(|refusal| refusal.code)
    }

    #[test]
    fn every_method_has_its_expectation() {
        let expected: Vec<_> = expected().iter().map(|row| row.method).collect();
        let methods: Vec<_> = METHODS.iter().map(|info| info.name).collect();
        assert_eq!(expected, methods);
    }

    #[test]
    fn every_role_may_call_what_the_table_says_and_nothing_else() {
        for expected in expected() {
            for role in [Role::Reader, Role::Operator, Role::Admin] {
                let wanted = if role >= expected.person { Ok(()) } else { Err(Code::PermissionDenied) };
                assert_eq!(answer(&person(role), expected.call()), wanted, "{} by {}", expected.method, role.as_str());
            }
            let wanted = if expected.agent { Ok(()) } else { Err(Code::PermissionDenied) };
            assert_eq!(answer(&agent("web/coder"), expected.call()), wanted, "{} by an agent", expected.method);
        }
    }

    #[test]
    fn an_agent_reaches_only_its_own_agent_and_project() {
        for expected in expected().into_iter().filter(|row| row.agent) {
            let (method, params) = (expected.method, &expected.params);
            if params.get("target").is_some() {
                for other in ["web/other", "api/coder", "web", "api"] {
                    let foreign = call(method, with(params.clone(), json!({ "target": other })));
                    assert_eq!(answer(&agent("web/coder"), foreign), Err(Code::PermissionDenied), "{method}: {other}");
                }
            } else if params.get("project").is_some() {
                let foreign = call(method, with(params.clone(), json!({ "project": "api" })));
                assert_eq!(answer(&agent("web/coder"), foreign), Err(Code::PermissionDenied), "{method}");
            } else {
                assert!(["hello", "rpc.discover", "agent.listen"].contains(&method), "{method} has no target");
            }
        }
    }

    #[test]
    fn a_missing_target_is_the_calling_agent_and_is_refused_for_a_person() {
        for expected in expected().into_iter().filter(|row| row.agent) {
            let method = expected.method;
            let mut params = expected.params.clone();
            let members = params.as_object_mut().expect("an object");
            if members.remove("target").or_else(|| members.remove("project")).is_none() {
                continue;
            }
            let without_target = match Call::parse(method, members.clone()) {
                Ok(call) => call,
                Err(refusal) => {
                    assert_eq!(refusal.code, Code::InvalidParams);
                    assert!(["project.show", "project.pause"].contains(&method), "{method} always needs a target");
                    continue;
                }
            };
            let resolved = authorise(&agent("web/coder"), without_target.clone()).expect(method).into_call();
            assert_eq!(resolved, expected.call(), "{method}");
            assert_eq!(answer(&person(Role::Admin), without_target), Err(Code::InvalidParams), "{method}");
        }
    }

    #[test]
    fn a_root_daemon_reaches_files_for_root_alone() {
        let is_root = nix::unistd::geteuid().is_root();
        for expected in expected() {
            let other = Peer { uid: 1234, ..person(Role::Admin) };
            let wanted = if expected.reaches_files && is_root { Err(Code::PermissionDenied) } else { Ok(()) };
            assert_eq!(answer(&other, expected.call()), wanted, "{}", expected.method);
        }
        // These methods do so only with certain parameters.
        for (method, params) in [
            ("agent.attach", json!({ "target": "web/coder", "read_only": true })),
            ("agent.show", json!({ "target": "web/coder" })),
            ("project.resume", json!({ "project": "web" })),
        ] {
            let other = Peer { uid: 1234, ..person(Role::Operator) };
            assert_eq!(answer(&other, call(method, params)), Ok(()), "{method}");
        }
    }
}
