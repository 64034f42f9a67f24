// Package token says which node a bearer token speaks for. The token is a
// Kubernetes service account token, projected into the agent's pod for this
// collector alone; the API server says whether it is genuine.
//
// Promises:
//
//   - The node comes from what the API server answers, never from what the
//     token or the agent says: from the claim that binds the token to a node,
//     or, on API servers older than 1.30, from the pod that it names.
//   - What the token says about itself is read only to refuse it sooner, and
//     to know when it ends once the API server has confirmed it.
//   - While the API server does not answer, a token that it has confirmed
//     before counts on until its end and a grace; any other one is told to come
//     back. Nothing is accepted that was never confirmed.
//   - The API server is asked a bounded number of times at once and per
//     second, and not for an address whose tokens it keeps refusing. Memory is
//     bounded too.
//
// A token is kept as its hash.
package token
